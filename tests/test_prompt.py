"""Prompts of every form against transformers' LlavaProcessor, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_tokenizer import byte_level, opened, pieces

from vlm_edge.errors import (
    EmptyPrompt,
    ImageCountMismatch,
    ImageUnreadable,
    LimitNotKept,
    PromptError,
    TemplateError,
    VisualTokenMismatch,
)
from vlm_edge.runtime.manifest import PromptSettings
from vlm_edge.runtime.prompt import BuiltPrompt, build_prompt
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling.anyres import AnyResTiler
from vlm_edge.runtime.tiling.plan import TileLimits, Tiler
from vlm_edge.runtime.tiling.settings import AnyRes, SingleTile
from vlm_edge.runtime.tiling.single import SingleTiler

PLACES = 9  # 3 x 3 patches; "default" drops the class token that num_additional_image_tokens counts
ONE_TILE = SingleTiler(SingleTile("single", PLACES))

TEMPLATES = {
    "vicuna": (  # llava-hf/llava-1.5-7b-hf
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "chatml": (  # as Qwen2-VL: strings and parts
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content %}<image>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "mistral": (  # writes bos itself
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}[INST] {% for part in message['content'] %}"
        "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '\n<image>' }}{% endif %}"
        "{% endfor %} [/INST]{% else %} {{ message['content'][0]['text'] | trim }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "strings": (  # a language model's own, which knows no parts
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


class Side:
    """The same checkpoint on both sides: `theirs` a LlavaProcessor, `ours` the runtime's values."""

    def __init__(self, core: Any, folder: Path, template: str | None, **named: str) -> None:
        from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

        size = {"shortest_edge": 30}
        self.theirs = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size=size, crop_size={"height": 30, "width": 30}),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, **named),
            patch_size=10,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
        self.tokenizer = opened(core, folder)
        image = self.tokenizer.token_to_id("<image>")
        assert image is not None
        self.settings = PromptSettings("<image>", image, None, named)
        self.template = ChatTemplate(template, named) if template else None

    def ours(self, prompt: Any, images: Any = (), template: bool = True) -> BuiltPrompt:
        return build_prompt(
            prompt, images, self.settings, self.tokenizer, self.template, ONE_TILE,
            use_template=template,
        )  # fmt: skip

    def expected(self, messages: list[dict[str, Any]]) -> list[int]:
        found = self.theirs.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return [int(token) for token in found["input_ids"][0]]

    def expected_raw(self, text: str, images: list[Image.Image]) -> list[int]:
        found = self.theirs(text=text, images=images or None)
        return [int(token) for token in found["input_ids"][0]]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: Any) -> dict[str, Side]:
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    qwen = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {
        "vicuna": Side(pieces(), tmp_path_factory.mktemp("v"), TEMPLATES["vicuna"], **llama),
        "mistral": Side(pieces(), tmp_path_factory.mktemp("m"), TEMPLATES["mistral"], **llama),
        "chatml": Side(
            byte_level(False), tmp_path_factory.mktemp("c"), TEMPLATES["chatml"], **qwen
        ),
        "strings": Side(
            byte_level(False), tmp_path_factory.mktemp("s"), TEMPLATES["strings"], **qwen
        ),
        "none": Side(pieces(), tmp_path_factory.mktemp("n"), None, **llama),
    }


def picture(value: int = 0) -> Image.Image:
    return Image.new("RGB", (33, 40), (value, 80, 160))


def png(value: int = 0) -> bytes:
    data = io.BytesIO()
    picture(value).save(data, "PNG")
    return data.getvalue()


def pixels(built: BuiltPrompt) -> list[Image.Image]:
    return [picture.decoded.image for picture in built.pictures]


A, B = picture(1), picture(2)
PARTS = ["vicuna", "mistral", "chatml"]
TURNS = [
    [{"role": "user", "content": [{"type": "text", "text": "What is red?"}]}],
    [
        {
            "role": "user",
            "content": [{"type": "image", "image": A}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": " A roof. "}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And   here "}, {"type": "image", "image": B}],
        },
    ],
]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("turns", TURNS)
def test_messages_equal_transformers(
    kind: str, turns: list[dict[str, Any]], sides: dict[str, Side]
) -> None:
    found = sides[kind].ours(turns)
    assert found.token_ids == sides[kind].expected(turns)
    assert pixels(found) == ([A, B] if len(turns) > 1 else [])
    assert found.visual_tokens == PLACES * len(found.pictures)
    assert found.text == sides[kind].theirs.apply_chat_template(turns, add_generation_prompt=True)


@pytest.mark.parametrize("kind", PARTS)
def test_a_text_with_images_is_one_user_message(kind: str, sides: dict[str, Side]) -> None:
    image = {"type": "image", "image": A}
    content = [image, {**image, "image": B}, {"type": "text", "text": "Compare them."}]
    expected = sides[kind].expected([{"role": "user", "content": content}])
    found = sides[kind].ours("Compare them.", [A, B])
    assert found.token_ids == expected
    assert pixels(found) == [A, B]
    assert sides[kind].ours("Compare them.", [A, B]).token_ids == expected
    alone = sides[kind].expected([{"role": "user", "content": content[:1]}])
    assert sides[kind].ours("", A).token_ids == alone  # one image, not in a list


@pytest.mark.parametrize("kind", PARTS)
def test_texts_and_images_in_turn(kind: str, sides: dict[str, Side], tmp_path: Path) -> None:
    path = tmp_path / "b.png"
    path.write_bytes(png())
    content = [
        {"type": "text", "text": "What differs between"},
        {"type": "image", "image": A},
        {"type": "text", "text": "and"},
        {"type": "image", "image": str(path)},
        {"type": "text", "text": "?"},
    ]
    expected = sides[kind].expected([{"role": "user", "content": content}])
    for last in (path, {"image": str(path)}, path.read_bytes()):
        found = sides[kind].ours(["What differs between", A, "and", last, "?"])
        assert found.token_ids == expected
        assert len(found.pictures) == 2
    found = sides[kind].ours(["What is", A, "?"], template=False)
    assert found.token_ids == sides[kind].expected_raw("What is<image>?", [A])


@pytest.mark.parametrize("kind", [*PARTS, "none"])
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("USER: <image>\nWhat? ASSISTANT:", 1),
        ("<image><image> both  <image>", 3),
        (" no image ", 0),
        ("<s> bos by hand", 0),
        ("<image>", 1),
    ],
)
def test_verbatim_text_equals_transformers(
    kind: str, text: str, count: int, sides: dict[str, Side]
) -> None:
    images = [A, B, A][:count]
    found = sides[kind].ours(text, images, template=False)
    assert found.token_ids == sides[kind].expected_raw(text, images)
    assert found.text == text


def test_a_template_that_writes_bos_gets_no_second_one(sides: dict[str, Side]) -> None:
    bos = sides["mistral"].tokenizer.token_to_id("<s>")
    assert sides["mistral"].ours("Hello").token_ids.count(bos) == 1
    assert sides["vicuna"].ours("Hello").token_ids.count(bos) == 1


def test_strings_for_a_template_of_strings(sides: dict[str, Side]) -> None:
    side = sides["strings"]
    assert not side.template.takes_parts  # type: ignore[union-attr]
    text = [{"role": "user", "content": "Hello"}]
    assert side.ours(text).token_ids == side.expected(text)
    assert side.ours("Hello").token_ids == side.expected(text)
    written = [{"role": "user", "content": "<image>\nWhat?"}]
    rendered = side.theirs.apply_chat_template(written, add_generation_prompt=True)
    expected = side.expected_raw(rendered, [A])
    assert side.ours("What?", [A]).token_ids == expected
    assert side.ours(written, [A]).token_ids == expected  # the placeholder spelled in the text


def test_strings_for_a_template_of_parts_are_not_lost(sides: dict[str, Side]) -> None:
    side = sides["vicuna"]
    assert side.template is not None
    assert side.template.takes_parts
    assert not side.template.takes_strings
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert side.ours([{"role": "user", "content": "Hello"}]).token_ids == side.expected(parts)
    both = sides["chatml"]
    system = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello", "name": None},
    ]
    assert both.ours(system).token_ids == both.expected(system)


def test_openai_messages(sides: dict[str, Side], tmp_path: Path) -> None:
    path = tmp_path / "ü b.png"
    path.write_bytes(png(3))
    data = base64.b64encode(png(4)).decode()
    for address, expected in [
        (f"data:image/png;base64,{data}", picture(4)),
        (str(path), picture(3)),
        (path.as_uri(), picture(3)),
    ]:
        part = {"type": "image_url", "image_url": {"url": address, "detail": "low"}}
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        found = sides["vicuna"].ours(turns)
        assert pixels(found) == [expected]
        assert found.token_ids == sides["vicuna"].ours("What?", [A]).token_ids
        part["image_url"] = address
        assert pixels(sides["vicuna"].ours(turns)) == [expected]


def test_parts_without_a_source_take_images_in_order(
    sides: dict[str, Side], tmp_path: Path
) -> None:
    path = tmp_path / "c.png"
    path.write_bytes(png(5))
    content = [
        {"type": "image"},
        {"type": "image", "base64": base64.b64encode(png()).decode()},
        {"type": "image", "path": str(path)},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    turns = [{"role": "user", "content": content}]
    found = sides["vicuna"].ours(turns, [A, B])
    assert pixels(found) == [A, picture(), picture(5), B]
    for images in ([A], [A, B, A]):
        with pytest.raises(ImageCountMismatch):
            sides["vicuna"].ours(turns, images)


TALL = Image.new("RGB", (20, 55))
ANYRES = AnyResTiler(
    AnyRes("anyres", (3, 3), ((30, 60), (60, 30), (60, 60)), (30, 30), "bicubic", "n.npy"), (30, 30)
)


@pytest.mark.parametrize(
    ("tiler", "limits", "counts"),
    [
        (SingleTiler(SingleTile("single", 4)), TileLimits(), [4, 4]),
        # Overview, detail and newlines. TALL in 60 x 30: 6 rows of 3 (its 2.18 columns leave less than
        # a column of padding on each side); A in 60 x 60: 6 rows of 4 (its width is 4.95 columns).
        (ANYRES, TileLimits(), [9 + 6 * 3 + 6, 9 + 6 * 4 + 6]),
        (ANYRES, TileLimits(max_tiles=3), [9 + 6 * 3 + 6, 9 + 4 * 3 + 4]),
        (ANYRES, TileLimits(max_tiles=1), [9 + 1, 9 + 1]),
    ],
)
def test_places_of_each_image(
    tiler: Tiler, limits: TileLimits, counts: list[int], sides: dict[str, Side]
) -> None:
    side = sides["vicuna"]
    found = build_prompt(
        "Hi", [TALL, A], side.settings, side.tokenizer, side.template, tiler, limits=limits
    )
    assert [picture.plan.tokens for picture in found.pictures] == counts
    assert found.visual_tokens == sum(counts)
    image = side.settings.image_token_id
    assert found.token_ids.count(image) == sum(counts)
    begin = found.token_ids.index(image)  # the template's newline stands between the two
    assert found.token_ids[begin : begin + counts[0]] == [image] * counts[0]
    assert found.token_ids[begin + counts[0]] != image


def test_limits_that_cannot_be_kept(sides: dict[str, Side]) -> None:
    side = sides["vicuna"]
    with pytest.raises(LimitNotKept, match="max_visual_tokens = 8 cannot be kept: .* at least 9"):
        build_prompt(
            "Hi", [A], side.settings, side.tokenizer, side.template, ONE_TILE,
            limits=TileLimits(max_visual_tokens=8),
        )  # fmt: skip


def test_a_mismatch_names_every_term(sides: dict[str, Side]) -> None:
    """Overview, tiles and newlines of each picture."""
    side = sides["none"]
    settings = PromptSettings("[img]", 3, None, {})
    with pytest.raises(
        VisualTokenMismatch, match=r"expected 63 = 9 \+ 24 \+ 6 \+ 9 \+ 12 \+ 3 visual"
    ):
        build_prompt(
            "[img] x [img]", [A, Image.new("RGB", (9, 9))], settings, side.tokenizer, None, ANYRES,
            use_template=False,
        )  # fmt: skip


@pytest.mark.parametrize("prompt", ["", " \n", [], [" "], [{"role": "user", "content": []}]])
def test_nothing_to_answer(prompt: Any, sides: dict[str, Side]) -> None:
    with pytest.raises(EmptyPrompt):
        sides["vicuna"].ours(prompt)
    if not prompt or isinstance(prompt[0], str):
        with pytest.raises(EmptyPrompt):
            sides["vicuna"].ours(prompt, template=False)


def test_counts_must_agree(sides: dict[str, Side]) -> None:
    side = sides["vicuna"]
    for prompt, images, template in [
        ("<image> What?", [A], True),  # the template places one more
        ("<image> What?", [], True),
        ("<image> What?", [], False),
        ("What?", [A], False),
    ]:
        with pytest.raises(ImageCountMismatch, match="<image>"):
            side.ours(prompt, images, template)


def test_a_placeholder_that_is_no_token(sides: dict[str, Side]) -> None:
    side = sides["none"]
    settings = PromptSettings("[img]", 3, None, {})
    with pytest.raises(VisualTokenMismatch):
        build_prompt("[img] x", [A], settings, side.tokenizer, None, ONE_TILE, use_template=False)


def test_template_errors(sides: dict[str, Side]) -> None:
    with pytest.raises(TemplateError, match="template=False"):
        sides["none"].ours("Hello")
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    with pytest.raises(TemplateError, match="roles must alternate user/assistant"):
        sides["mistral"].ours([turn, turn])
    with pytest.raises(TemplateError, match="not valid Jinja"):
        ChatTemplate("{% for x %}", {})
    for unsafe in ("{{ ''.__class__.__mro__ }}", "{{ namespace(__x__=1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(TemplateError):
            ChatTemplate(unsafe, {}).render([])


DATA = {"name": "é <b>", "n": [1, True, None]}
FEATURES = [
    "{{ messages[0].data | tojson }}|{{ messages | tojson(indent=2) }}|{{ bos_token }}",
    "{% for m in messages %}\n  {% if loop.last %}\n  last\n{% break %}\n  {% endif %}\n{% endfor %}\n",
    "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) }}{{ tools is none }}{{ documents is none }}{{ unknown is defined }}",
    "{{ strftime_now('%Y') | length }}{% generation %}{{ messages[0].role }}{% endgeneration %}",
    "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[0].image }}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_jinja_as_transformers_has_it(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "x", "data": DATA, "reasoning": "r", "image": A}]
    expected, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages) == expected[0]


@pytest.mark.parametrize(
    ("prompt", "images", "why"),
    [
        ([{"role": "user", "content": [{"type": "video", "video": "v"}]}], [], "video"),
        ([{"role": "user", "content": ["text"]}], [], "str"),
        ([{"role": "user", "content": 3}], [], "int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], "image_url"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], [], "int"),
        ([{"role": "user", "content": "a"}, "b"], [], "role"),
        (["a", A], [B], "not both"),
        (["a", {"type": "image"}], [], "its own"),
        (["a", 3], [], "int"),
        (b"bytes", [], "bytes"),
        (None, [], "NoneType"),
        ("a", ["https://example.com/a.png"], "download"),
        ("a", ["file://elsewhere/a.png"], "another machine"),
        ("a", [3], "int"),
    ],
)
def test_what_cannot_be_read_is_named(
    prompt: Any, images: Any, why: str, sides: dict[str, Side]
) -> None:
    with pytest.raises(PromptError, match=why):
        sides["vicuna"].ours(prompt, images)


def test_messages_need_the_template(sides: dict[str, Side]) -> None:
    with pytest.raises(PromptError, match="chat template"):
        sides["vicuna"].ours([{"role": "user", "content": "a"}], template=False)


def test_damaged_base64(sides: dict[str, Side]) -> None:
    with pytest.raises(ImageUnreadable, match="base64"):
        sides["vicuna"].ours("a", ["data:image/png;base64,*"])


def test_the_callers_messages_stay_as_they_were(sides: dict[str, Side]) -> None:
    part = {"type": "image", "image": A}
    turns = [{"role": "user", "content": [part], "name": None}]
    sides["vicuna"].ours(turns)
    assert turns == [{"role": "user", "content": [part], "name": None}]
    assert part == {"type": "image", "image": A}
