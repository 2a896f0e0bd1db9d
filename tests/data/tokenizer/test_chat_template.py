"""Templates render as in transformers, and cannot leave the sandbox."""

import pytest

from megatron_dmc.data.tokenizer.chat_template import BYTES_LIMIT, ChatTemplate, read_chat_template, template_file
from tests.data.tokenizer.directories import auto_tokenizer, byte_level_directory, sentencepiece_directory, write

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA2 = """{%- if messages[0].role == 'system' -%}
    {%- set told = '<<SYS>>\\n' + messages[0].content | trim + '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set told = '' -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user/assistant') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + (told if loop.first else '') + message.content | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
FEATURES = """{%- set ns = namespace(count=0, last=none) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = message.content %}
{%- endfor %}
{%- if tools is not none and tools is defined %}tools{% endif %}
{{- dict(a=ns.count) | tojson }} {{ messages[-1] | tojson(indent=1) }} {{ ns.last.split(' ')[0] }}
{% generation %}
    {{ undefined_token }}said
{% endgeneration %}
{{ strftime_now('%Y') | length }}"""
CONVERSATION = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "hello <b>\u6771</b>"},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "the fox"},
]


def theirs(folder, messages):
    return auto_tokenizer(folder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("source", [CHATML, LLAMA2, FEATURES], ids=["chatml", "llama2", "features"])
@pytest.mark.parametrize("length", [2, 4])
def test_templates_render_as_in_transformers(tmp_path, source, length):
    sentencepiece_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    template = read_chat_template(tmp_path)
    for messages in (CONVERSATION[:length], CONVERSATION[1:length]):
        assert template.render(messages) == theirs(tmp_path, messages)


@pytest.mark.parametrize(
    "stated", [CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]]
)
def test_a_template_in_the_configuration_of_the_tokenizer(tmp_path, stated):
    byte_level_directory(tmp_path)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    write(tmp_path / "tokenizer_config.json", {**config, "chat_template": stated})
    assert read_chat_template(tmp_path).render(CONVERSATION) == theirs(tmp_path, CONVERSATION)
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }} alone")
    assert read_chat_template(tmp_path).render(CONVERSATION) == "<|end_of_text|> alone"


def test_the_first_folder_with_a_template_counts(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (second / "chat_template.jinja").write_text("second")
    assert read_chat_template(first, second).render(CONVERSATION) == "second"
    (first / "chat_template.jinja").write_text("first{{ bos_token }}")
    write(first / "tokenizer_config.json", {"bos_token": "<s>"})
    assert read_chat_template(first, second).render(CONVERSATION) == "first<s>"
    (tmp_path / "other.jinja").write_text("{{ bos_token }}other")
    assert template_file(tmp_path / "other.jinja", first).render(CONVERSATION) == "<s>other"


def test_a_base_model_has_none(tmp_path):
    write(tmp_path / "tokenizer_config.json", {"chat_template": None})
    with pytest.raises(ValueError, match=f"no chat template in {tmp_path}: a base model .* --chat-template"):
        read_chat_template(tmp_path, tmp_path)


def test_a_template_that_refuses_says_why(tmp_path):
    template = ChatTemplate(LLAMA2, tmp_path, {"bos_token": "", "eos_token": ""})
    with pytest.raises(ValueError, match="does not take this conversation: roles must alternate"):
        template.render([CONVERSATION[1], CONVERSATION[1]])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '%s'|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{% set ns = namespace() %}{% set ns._Namespace__attrs = {} %}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 // 0 }}",
    ],
)
def test_hostile_templates_get_nowhere(tmp_path, source):
    with pytest.raises(ValueError, match="does not take this conversation"):
        ChatTemplate(source, tmp_path, {}).render(CONVERSATION)


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% unknown %}"])
def test_what_is_no_template_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match="holds no chat template that can be read"):
        ChatTemplate(source, tmp_path, {})


def test_files_that_are_no_text_or_too_large(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_chat_template(tmp_path)
    path.write_bytes(b" " * (BYTES_LIMIT + 1))
    with pytest.raises(ValueError, match="larger than"):
        read_chat_template(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        template_file(tmp_path / "nowhere")
