"""A checkpoint whose output is known in advance: every token has one successor.

The embedding is the identity, attention and MLP add nothing, and the row of `lm_head` for a token holds the tokens after which
it comes. So a script is played word for word, at any temperature, through the real tokenizer, chat template and engine: what a
model says when it calls a tool is no matter of luck.
"""

import json
import struct
from pathlib import Path

# Token by token. A piece occurs in one script only, or its successor would not be known; the ends of tokens lie where parsers
# find them inconvenient: inside tags, JSON strings and a character of four bytes.
SCRIPTS = {
    "talk": ["Naïve ", b"\xf0", b"\x9f", b"\x8c", b"\x8a", " waves ro", "ll ash", "ore; the riv", "er meets the se", "a."],
    "count": [*(f"{n}, " for n in range(1, 10)), "10."],
    "call": [
        "<tool_",
        'call>\n{"name": "get_wea',
        'ther", "argu',
        'ments": {"city": "Lis',
        'bon", "unit": "c"}}\n</tool',
        "_call>",
    ],
    "two": [
        "I look. <tool_ca",
        'll>{"name": "get_weather", "arguments": {"city": "Por',
        'to"}}</tool_call>\n<tool',
        '_call>{"name": "get_time", "arg',
        'uments": {}}</',
        "tool_call>",
    ],
    "broken": ["<tool_call", '>{"name": 1}</tool_c', "all> after"],
    "answer": ["It is s", "unny in Lis", "bon: 21 d", "egrees."],
}

TEXTS = {
    name: b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces).decode()
    for name, pieces in SCRIPTS.items()
}
"""What each script says."""

LENGTHS = {name: len(pieces) + 1 for name, pieces in SCRIPTS.items()}
"""Tokens of each script, with its end."""

END = "<|im_end|>"

# The script is chosen by what the chat is about: an answer after a tool's result, a call where there are tools, talk otherwise;
# `script` in chat_template_kwargs chooses another.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message.tool_calls %}{{ '\\n<tool-call>' + (call.function | tojson) + '</tool-call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if script %}{{ '<|' + script + '|>' }}{% elif messages[-1]['role'] == 'tool' %}{{ '<|answer|>' }}"
    "{% elif tools %}{{ '<|call|>' }}{% else %}{{ '<|talk|>' }}{% endif %}{% endif %}"
)

CONTEXT = 1024


def write(directory: Path) -> Path:
    """Write the checkpoint into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    controls = ["<|endoftext|>", "<|im_start|>", END, *(f"<|{name}|>" for name in SCRIPTS)]
    ids = {content: 256 + index for index, content in enumerate(controls)}
    added = [_added(content, id, special=True) for content, id in ids.items()]
    after: dict[int, int] = {}
    for name, pieces in SCRIPTS.items():
        last = ids[f"<|{name}|>"]
        for piece in pieces:
            if isinstance(piece, bytes):
                id = piece[0]
            else:
                assert piece not in ids, f"{piece!r} is in two scripts"
                id = ids[piece] = 256 + len(ids)
                added.append(_added(piece, id, special=False))
            assert last not in after, f"two successors in script {name}"
            after[last] = id
            last = id
        after[last] = ids[END]
    width = (256 + len(ids) + 15) // 16 * 16
    _json(directory / "tokenizer.json", _tokenizer(added))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": "<|endoftext|>", "bos_token": None}
    _json(directory / "tokenizer_config.json", {**config, "chat_template": TEMPLATE, "model_max_length": CONTEXT})
    _json(directory / "generation_config.json", {"eos_token_id": [ids[END], ids["<|endoftext|>"]]})
    _json(
        directory / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "vocab_size": width,
            "hidden_size": width,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "eos_token_id": ids[END],
            "torch_dtype": "float32",
        },
    )
    _weights(directory / "model.safetensors", width, after)
    return directory


def _weights(path: Path, width: int, after: dict[int, int]) -> None:
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (width, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (width, width),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        f"{layer}self_attn.o_proj.weight": (width, 16),
        f"{layer}mlp.gate_proj.weight": (16, width),
        f"{layer}mlp.up_proj.weight": (16, width),
        f"{layer}mlp.down_proj.weight": (width, 16),
    }
    for name in "qkv":
        shapes[f"{layer}self_attn.{name}_proj.weight"] = (16, width)
        shapes[f"{layer}self_attn.{name}_proj.bias"] = (16,)
    header, data = {}, bytearray()
    for name, shape in shapes.items():
        values = [1.0 if name.endswith("norm.weight") else 0.0] * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        if name == "model.embed_tokens.weight":
            for id in range(width):
                values[id * width + id] = 1.0
        if name == "lm_head.weight":
            # A one-hot row of norm 1 leaves the last norm as sqrt(width): far above what a temperature of 2 can level.
            for last, id in after.items():
                values[id * width + last] = 8.0
        begin = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _tokenizer(added: list) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
        "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {_byte_char(byte): byte for byte in range(256)}, "merges": []},
    }


def _byte_char(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte (Radford et al. 2019)."""

    def printable(b: int) -> bool:
        return 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b

    return chr(byte) if printable(byte) else chr(0x100 + sum(not printable(b) for b in range(byte)))


def _added(content: str, id: int, special: bool) -> dict:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"id": id, "content": content, "special": special, **flags}


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
