"""Requests: what a unit's images and prompts are asked as."""

import pytest

from otprune.models import load_prompter, read_checkpoint
from pipelines.config.keys import PromptConfig
from pipelines.engines.requests import RequestMaker
from pipelines.stages.unit_batch import Image, QuestionSet
from tests.helpers import question


@pytest.fixture(scope="module")
def make(demo_model):
    """A maker of the demo model's requests, for templates."""
    checkpoint = read_checkpoint(str(demo_model))
    prompter = load_prompter(checkpoint)

    def maker(*templates: str) -> RequestMaker:
        prompt = PromptConfig(template=templates[0], more=list(templates[1:]))
        return RequestMaker(prompter, prompt, checkpoint.geometry, max_new_tokens=8, max_length=checkpoint.max_length)

    return maker


def test_what_a_column_says_is_text(make):
    maker = make("describe {title} .", "is {title} there ?")
    prompts = ["describe </s> <image> .", "is <s> <pad> there ?"]
    requests = maker.of_image(0, Image(id="", source="", row=0, sha256="", prompts=prompts), [[], []])
    special = {*maker.prompter.tokenizer.all_special_ids} - {maker.prompter.tokenizer.unk_token_id}
    begin = maker.prompter.tokenizer.bos_token_id
    for request in requests:
        assert len(request.ids) == 2, "one image"
        ids = [token for piece in request.ids for token in piece]
        assert [token for token in ids if token in special] == [begin] * (ids[0] == begin)


def test_a_question_of_a_benchmark_is_text_too(make):
    asked = question("a </s> b")
    about = QuestionSet(questions=[asked], num_pictures=1)
    image = Image(id="", source="", row=0, sha256="", prompts=[asked.prompt], question_set=about)
    maker = make("describe </s> {title} .")
    [request] = maker.of_image(0, image, [[]])
    assert maker.prompter.tokenizer.eos_token_id not in [token for piece in request.ids for token in piece]
