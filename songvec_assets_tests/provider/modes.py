"""The oddities of real servers, as named modes of the provider: `provider.control(mode="gemini")`.

Each is what was read in public threads and pages (November 2026), not what was seen at a live service. Oddities that
one text brings about, such as NaN, are faults by words of the text: see `faults.Faults`.
"""

from typing import Any, NamedTuple


class Mode(NamedTuple):
    """What a server does, as faults, and where that was read."""

    faults: dict[str, Any]
    source: str


MODES = {
    "gemini": Mode(
        {
            "refuse_base64": True, "index": "not first", "native_dimensions": 3072, "max_texts": 100,
            "max_texts_words": "* BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch",
        },
        "Gemini's OpenAI endpoint leaves `index` out where it is 0, refuses base64 (Roo-Code #7761) and more than 100 "
        "texts (gel #9032); gemini-embedding-001 has 3,072 values",
    ),
    "vllm": Mode(
        {
            "refuse_dimensions": True,
            "refuse_dimensions_words": 'Model "{model}" does not support matryoshka representation, changing output '
            "dimensions will lead to poor results.",
        },
        "vllm #16331: `dimensions` is refused for models whose config does not say is_matryoshka; Qwen3-Embedding #188",
    ),
    "tei": Mode(
        {
            "max_texts": 32, "max_texts_status": 422,
            "max_texts_words": "batch size {n} > maximum allowed batch size {most}",
            "every": 20, "every_status": 424,
            "every_body": {"error": "Backend error: CUBLAS_STATUS_NOT_SUPPORTED", "error_type": "Backend"},
        },
        "text-embeddings-inference #378 (422 for more than 32 texts), #61 (424 for a passing error of the GPU)",
    ),
    "dashscope": Mode(
        {"max_texts": 10, "max_texts_words": "batch size is invalid, it should not be larger than 10.: input.contents"},
        "DashScope, also behind LiteLLM: 400 for more than 10 texts",
    ),
    "siliconflow": Mode(
        {"max_texts": 64, "max_texts_status": 413, "max_texts_words": "input batch size {n} > maximum allowed {most}"},
        "SiliconFlow, also behind LiteLLM: no more than 64 texts",
    ),
    "litellm": Mode(
        {"max_texts": 10, "max_texts_status": 422, "max_texts_words": "UnprocessableEntityError: Invalid input"},
        "LiteLLM passes limits of what is behind it on, as 400 or 422, and may hide their words",
    ),
    "lmstudio": Mode({"wrong_path_200": True}, "LM Studio #618: 200 with an error for a path that it does not have"),
    "openrouter": Mode({"poison": ["POISON"], "poison_inside": True}, "OpenRouter: the refusal inside of a 200"),
    "ollama": Mode({"cold_s": 2.0}, "ollama #8006: loading a model is aborted when the client hangs up"),
    "llama.cpp": Mode(
        {"fail": ["LONG"], "fail_status": 500}, "llama.cpp #11105: 500 for a text longer than the physical batch"
    ),
}  # fmt: skip
