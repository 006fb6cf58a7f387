"""The report and the terminal summary of a caption job, and the plots and the base template of every page."""
