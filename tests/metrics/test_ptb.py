"""The tokenizer against stated rules, and against the original where Java is found."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.metrics.ptb import tokenize

SAMPLE = Path(__file__).parents[1] / "data" / "captions_sample.json"
DROPPED = ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, riding a HORSE.", "a man riding a horse"),
        ("two\nlines\tand  spaces ", "two lines and spaces"),
        ("", ""),
        (" . ", ""),
        ("the dog's ball, the dogs' toys", "the dog 's ball the dogs toys"),
        ("it's they're we've I'm I'd he'll", "it 's they 're we 've i 'm i 'd he 'll"),
        ("don't CAN'T isn't couldn't've", "do n't ca n't is n't could n't 've"),
        ("cannot gonna wanna gotta-go 'tis", "can not gon na wan na gotta-go 't is"),
        ("don\u2019t \u201cstop\u201d \u2018here\u2019", "do n't stop here"),
        ("5 o'clock O'Brien rock 'n' roll '90s 90's", "5 o'clock o'brien rock 'n' roll '90s 90 's"),
        ("a black-and-white T-shirt, 5-year-old", "a black-and-white t-shirt 5-year-old"),
        ("cat/dog and/or 1/2 w/ w/o", "cat/dog and/or 1/2 w / w/o"),
        ("U.S. t.v. D.V.D u.s.-based USA.", "u.s. t.v. d.v.d u.s.-based usa"),
        ("Fort York Blvd. and Main St. by Mr. Smith etc.", "fort york blvd. and main st. by mr. smith etc."),
        ("near Lake Ave.", "near lake ave."),
        ("J. Smith in row b. of it", "j. smith in row b. of it"),
        ("the letter C. The end. No. 5 but no.", "the letter c the end no. 5 but no"),
        ("a sign with the letter A.", "a sign with the letter a"),
        ("vitamin C. ", "vitamin c"),
        ("by J. K. Rowling, plan b.", "by j. k. rowling plan b"),
        ("on the ground.A man", "on the ground.a man"),
        ("#41 bus 50% $5 $1.50 1,000 5:54pm 12:43", "# 41 bus 50 % $ 5 $ 1.50 1,000 5:54 pm 12:43"),
        ("a (left) [one] {two}", "a -lrb- left -rrb- -lsb- one -rsb- -lcb- two -rcb-"),
        ("wait... what -- a dog \u2014 here \u2026 hm", "wait what a dog here hm"),
        ("hello! what? what!! no?!", "hello what what !! no ?!"),
        ("@home www.cat.com me@cat.com #cat", "@home www.cat.com me@cat.com #cat"),
        ("B&W black&white M&M's", "b&w black & white m&m 's"),
        ("colour grey theatre caf\u00e9", "colour grey theatre caf\u00e9"),
        ("22 \u00be inches", "22 3/4 inches"),
    ],
)
def test_the_rules_of_the_published_tokenizer(caption: str, tokens: str):
    assert tokenize(caption) == tokens.split()


def test_every_caption_of_the_sample_has_the_tokens_of_the_java_tokenizer(tmp_path: Path):
    captions = [text for texts in json.loads(SAMPLE.read_text()).values() for text in texts]
    theirs = java_tokens(captions, tmp_path)
    differing = [(caption, want) for caption, want in zip(captions, theirs, strict=True) if tokenize(caption) != want]
    assert differing == []


def test_a_letter_before_the_final_dot_is_cut_as_before_another_caption(tmp_path: Path):
    """As the original cuts it where the next line begins with A."""
    captions = ["a sign with the letter A.", "A man in plan b.", "A cup of vitamin C.", "A man"]
    assert [tokenize(caption) for caption in captions] == java_tokens(captions, tmp_path)


def java_tokens(captions: list[str], folder: Path) -> list[list[str]]:
    """What pycocoevalcap's tokenizer gives; run from here because it writes into its own package folder."""
    spec = importlib.util.find_spec("pycocoevalcap.tokenizer")
    if shutil.which("java") is None or spec is None or not spec.submodule_search_locations:
        pytest.skip("needs java and pycocoevalcap")
    jar = next(Path(spec.submodule_search_locations[0]).glob("stanford-corenlp-*.jar"))
    text = folder / "captions.txt"
    text.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    run = subprocess.run([*command, "-preserveLines", "-lowerCase", str(text)], capture_output=True, check=True)
    lines = run.stdout.decode().split("\n")[: len(captions)]
    return [[token for token in line.split() if token not in DROPPED] for line in lines]
