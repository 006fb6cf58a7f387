"""The page and the terminal summary of a caption job, and the plots of every page."""
