"""The method of a row, its label, and its style, which is the same in every picture of a report.

A family (SnapKV, whoever wrote it) has one colour and one marker. Ours are solid lines, those of peers dashed with a
thinner marker; an open marker means that heads do not compete for room, a filled one that the whole model does.
Nothing rests on colour alone, so a report can be printed in black and white. Colours: Okabe and Ito's palette.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["full", "own", "peer", "control"]
_RANK: dict[str, int] = {"full": 0, "own": 1, "peer": 1, "control": 2}
_SHARES = ("head", "layer", "model")
_SHARED = re.compile(r"\(share=\w+\)$")
_CONTROLS = ("random", "streamingllm")
_ALIASES = {"dynamiccache": "full", "dynamic": "full", "nopress": "full", "none": "full"}

KNOWN: dict[str, tuple[str, str]] = {
    "full": ("#000000", "*"),
    "snapkv": ("#0072B2", "o"),
    "keydiff": ("#D55E00", "s"),
    "tova": ("#009E73", "^"),
    "knorm": ("#CC79A7", "D"),
    "kvzip": ("#E69F00", "v"),
    "quantized": ("#56B4E9", "P"),
    "random": ("#8A8A8A", "X"),
    "streamingllm": ("#5A5A5A", "p"),
}
"""Colour and marker of the families that have fixed ones."""
_SPARE = [
    (colour, marker)
    for marker in ("h", "<", ">", "d")
    for colour in ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
]


@dataclass(frozen=True, kw_only=True)
class MethodKey:
    """Identity of one line of a chart: everything of a method but its budget."""

    policy: str
    share: str | None = None
    memory: str | None = None
    peer: str | None = None
    chunk: int | None = None

    @staticmethod
    def of(row: Mapping[str, Any]) -> "MethodKey":
        """Return the method of a row; any field may be missing."""
        chunk = row.get("chunk") if "task" in row else None  # bench speed always reads in chunks
        return MethodKey(
            policy=shorten(row.get("policy")),
            share=None if row.get("share") is None else shorten(row["share"]),
            memory=None if row.get("memory") in (None, "none") else shorten(row["memory"]),
            peer=None if row.get("peer") is None else shorten(row["peer"]),
            chunk=chunk if isinstance(chunk, int) else None,
        )

    @property
    def family(self) -> str:
        """The common name: ``snapkv`` for ours, with any share, and for ``kvpress:SnapKVPress``."""
        name = _SHARED.sub("", (self.peer or self.policy).rpartition(":")[2])
        short = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("press") or name
        return _ALIASES.get(short, short)

    @property
    def kind(self) -> Kind:
        """Ours, a peer's, a control, or the full cache."""
        if self.family in _CONTROLS:
            return "control"
        if self.peer is not None:
            return "peer"
        return "full" if self.family == "full" else "own"

    @property
    def label(self) -> str:
        """The name in tables and legends: ``snapkv``, ``snapkv, share model``, ``SnapKV (kvpress)``."""
        if self.peer is not None:
            package, _, name = self.peer.rpartition(":")
            short = name.removesuffix("Press") or name
            return f"{short} ({package})" if package else short
        implied = self.share in (None, "head") or self.kind == "full" or "share=" in self.policy
        share = "" if implied else f", share {self.share}"
        memory = f" + {self.memory}" if self.memory else ""
        chunk = f", chunk {self.chunk}" if self.chunk is not None and self.kind != "full" else ""
        return f"{self.policy}{share}{memory}{chunk}"

    @property
    def order(self) -> tuple[int, int, str, bool, int, str]:
        """The sort key: the full cache, then families with ours before peers, then controls."""
        known = list(KNOWN)
        place = known.index(self.family) if self.family in KNOWN else len(known)
        share = _SHARES.index(self.share) if self.share in _SHARES else len(_SHARES)
        return _RANK[self.kind], place, self.family, self.peer is not None, share, self.label


@dataclass(frozen=True, kw_only=True)
class Style:
    """The look of a method in charts; colours, markers and fill styles are matplotlib's."""

    color: str
    marker: str
    fillstyle: Literal["full", "bottom", "none"]
    dashed: bool
    strong: bool
    """In front, with intervals."""


def assign_styles(methods: Iterable[MethodKey]) -> dict[MethodKey, Style]:
    """Return the style of every method, in the order of a legend."""
    ordered = sorted(set(methods), key=lambda method: method.order)
    families = dict(KNOWN)
    taken = {KNOWN[method.family][0] for method in ordered if method.family in KNOWN}
    spare = sorted(_SPARE, key=lambda pair: pair[0] in taken)  # stable: unused colours first
    for i, family in enumerate(sorted({method.family for method in ordered} - set(KNOWN))):
        families[family] = spare[i % len(spare)]
    return {method: _make_style(method, *families[method.family]) for method in ordered}


def _make_style(method: MethodKey, color: str, marker: str) -> Style:
    fill: Literal["full", "bottom", "none"] = "none"
    if method.share == "model" or method.family == "full":
        fill = "full"
    elif method.share == "layer":
        fill = "bottom"
    return Style(
        color=color, marker=marker, fillstyle=fill, dashed=method.peer is not None, strong=method.kind == "own"
    )


def shorten(value: object, limit: int = 48) -> str:
    """Return text for labels: one printable line of at most ``limit`` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
