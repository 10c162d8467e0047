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
    "vertex": Mode(
        {
            "max_texts": 250, "max_request_tokens": 20_000, "max_request_tokens_status": 400, "errors_as": "detail",
            "max_texts_words": "{n} instances in one request, the limit is {most}",
            "max_request_tokens_words": "The input token count is {n} but the model supports up to {most}.",
        },
        "a gateway before Vertex: https://github.com/zosmaai/pi-llm-wiki/pull/103",
    ),
    "openai": Mode(
        {
            "max_request_tokens": 600_000, "max_request_tokens_status": 400, "error_type": "max_tokens_per_request",
            "max_request_tokens_words": "Requested {n} tokens, max {most} tokens per request",
        },
        "OpenAI's embeddings: https://github.com/timescale/pgai/issues/481",
    ),
    "litellm-ollama": Mode(
        {
            "refuse_encoding": True, "refuse_base64_status": 500,
            "refuse_base64_words": "litellm.UnsupportedParamsError: Setting {'encoding_format': 'base64'} is not "
            "supported by ollama, model=bge-m3.",
        },
        "LiteLLM before Ollama, which refuses floats that are asked for, too: "
        "https://github.com/BerriAI/litellm/pull/42421, https://github.com/BerriAI/litellm/issues/42426",
    ),
    "bge-m3": Mode(
        {
            "refuse_dimensions": True, "refuse_dimensions_status": 422, "errors_as": "detail list",
            "refuse_dimensions_words": "extra fields not permitted", "native_dimensions": 1024,
        },
        "servers that check with pydantic, for a model of one size: https://github.com/murtaza-nasir/speakr/pull/352",
    ),
    "int8 base64": Mode(
        {"base64_of": "int8"},
        "base64 that is read as a quarter of the width: https://github.com/pietheinstrengholt/rssmonster/issues/276",
    ),
    "no usage": Mode({"usage": "null"}, "LitServe: https://github.com/Lightning-AI/LitServe/pull/369"),
    "odd usage": Mode(
        {"usage": '{"prompt_tokens":"{n}"}'}, "another form of it: https://github.com/Lightning-AI/LitServe/pull/369"
    ),
    "byte order mark": Mode(
        {"mark": True}, "no report: what gateways on Windows write before JSON; gzip and other content types as well"
    ),
    "idle reset": Mode(
        {"idle": "reset"},
        "a server or a router in between that forgets connections: https://github.com/openai/openai-python/issues/371",
    ),
    "voyage": Mode(
        {
            "quota": {"requests_per_minute": 3, "tokens_per_minute": 10_000, "retry_after_s": 20},
            "errors_as": "detail", "retry_after_date": True,
        },
        "Voyage's free tier: https://github.com/pgEdge/pgedge-vectorizer/issues/69",
    ),
    "tei blank": Mode(
        {"blank_status": 413},
        "text-embeddings-inference for an empty text: "
        "https://github.com/huggingface/text-embeddings-inference/pull/727, and others with 400: "
        "https://github.com/kenn-io/msgvault/issues/291",
    ),
    "ollama native": Mode(
        {"native_at_api": True},
        "Ollama's own API, where its base URL was meant: https://github.com/cocoindex-io/cocoindex/issues/1226",
    ),
}  # fmt: skip
