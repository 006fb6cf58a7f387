"""Write committed captions where trainers read them: text files, WebDataset shards, Parquet, a Hugging Face dataset.

Usage: python jobs/export.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/export.py input.path=IMAGES output.path=CAPTIONS                         # a.txt beside each a.jpg
    python jobs/export.py input.path=CORPUS output.path=CAPTIONS export.path=OUT export.format=parquet
    python jobs/export.py input.path=CORPUS output.path=CAPTIONS export.path=OUT export.format=dataset export.hub=me/set

input.path and output.path are those of the caption job. Every file appears as a whole or not at all, and equal captions
give equal bytes. The same command goes on after a kill, and writes only what changed after the output has grown.

Exit codes:
    0    done
    1    a file of the corpus or a part of the output cannot be read; everything else is written
    2    bad configuration, or no such input or output
    130  interrupted
"""

import sys

from pipelines.config.schema import keys_of
from pipelines.entry import enter
from pipelines.export.config import ExportConfig

UNUSED = [name for name in keys_of(ExportConfig) if name.partition(".")[0] not in ("export", "input", "output")]


def run(config: ExportConfig) -> int:
    from pipelines.export.export import export

    done = export(config)
    print(f"export  {done.pieces:,} pieces in {done.path}, {done.written:,} of them written now")
    if done.hub:
        print(f"hub     {done.hub}")
    return 0


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, ExportConfig, without=UNUSED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
