"""One frozen model, many tasks that write: VLM's exact claims (spec 10, assertions 1 to 5)."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from howfine import batch as batches_of
from howfine import mixed, surgery, vectors
from howfine.base import Base
from howfine.combine import combine
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError, TaskError
from howfine.evaluate import evaluate, logits, predict
from howfine.layout import UNSEEN
from howfine.method import Method, method
from howfine.readout import Readout, Wired, readout
from howfine.recipe import Recipe
from howfine.task import Example, Task
from howfine.tune import tune
from tiny import HIDDEN, LAYERS, SPECIAL, VOCAB, WORDS, probe_for, tiny_base, tiny_writer

ALL = (*SPECIAL, *WORDS)
CAUSAL = ("gpt2", "llama", "qwen3", "gemma2")
KINDS = ("name", "area", "response")
EXAMPLES = [
    Example(
        ("name : w1 w2 | area : w3",),
        targets=("w4 w5", "w9"),
        segments=(("name", "w1 w2"), ("area", "w3"), ("response", "")),
    ),
    Example(("area : w6",), targets=("w7 w8 w9 w10",), segments=(("area", "w6"), ("response", ""))),
    Example(
        ("area : w11 w12 | name : w13 w14 w15",),
        targets=("w16",),
        segments=(("area", "w11 w12"), ("name", "w13 w14 w15"), ("response", "")),
    ),
]
BLOCK = method("adapter", placement="block", width=5, std=0.1, activation="relu")


def teller(**settings: Any) -> Readout:
    known = {"kinds": KINDS, "max_length": 40, "max_new_tokens": 8}
    return readout("typed_segments", **{**known, **settings})


def ids(words: str) -> list[int]:
    return [ALL.index(word) for word in words.split()]


def wired(base: Base, read: Readout, seed: int = 0) -> Wired:
    """Vectors as wide as the tiny models' words are: they are to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = read.attach(base, ())
        for row in head.parameters():
            nn.init.normal_(row, std=0.4)
    return Wired(base, read, head).eval()


def attached(base: Base, how: Method, read: Readout, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return how.attach(base, probe_for(how, read, base))


# --- what is read ---------------------------------------------------------------------------------


def test_inputs_worked_by_hand() -> None:
    """Markers stand before their segments; types align one to one with tokens."""
    base = tiny_writer("gpt2")
    batch = teller(max_new_tokens=4).collate(base, EXAMPLES[:2])
    blank = "[MASK]"
    rows = [
        f"{blank} {blank} w1 w2 {blank} w3 {blank} w4 w5 {blank}",
        f"{blank} {blank} w6 {blank} w7 w8 w9 w10 [PAD] [PAD]",  # no room for an end
    ]
    assert batch.inputs["input_ids"].tolist() == [ids(row) for row in rows]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 10, [1] * 8 + [0] * 2]
    assert batch.marks is not None
    assert batch.types is not None
    assert batch.targets is not None
    assert batch.marks.tolist() == [
        [0, 2, -1, -1, 3, -1, 4, -1, -1, 1],
        [0, 3, -1, 4, -1, -1, -1, -1, -1, -1],
    ]
    assert batch.types.tolist() == [
        [0, 2, 2, 2, 3, 3, 4, 4, 4, 4],
        [0, 3, 3, 4, 4, 4, 4, 4, -1, -1],
    ]
    assert batch.targets.tolist() == [
        [UNSEEN] * 7 + [*ids("w4 w5"), VOCAB],
        [UNSEEN] * 4 + ids("w7 w8 w9 w10") + [UNSEEN] * 2,
    ]
    asked = teller().collate(base, EXAMPLES[:2], labelled=False)
    assert asked.marks is not None
    assert asked.types is not None
    assert asked.marks.tolist() == [[0, 2, -1, -1, 3, -1, 4], [-1, -1, -1, 0, 3, -1, 4]]
    assert asked.types.tolist() == [[0, 2, 2, 2, 3, 3, 4], [-1, -1, -1, 0, 3, 3, 4]]
    plain = teller(typed=False).collate(base, EXAMPLES[:1])
    assert plain.types is not None
    assert (plain.types == -1).all()
    assert plain.marks is not None
    assert plain.marks.tolist() == [[0, 2, -1, -1, 3, -1, 4, -1, -1, 1]]


def test_a_text_by_hand_is_the_same_as_its_segments() -> None:
    base, read = tiny_writer("gpt2"), teller()
    for example in EXAMPLES:
        one = read.collate(base, [example])
        other = read.collate(base, [replace(example, segments=())])
        assert one.marks is not None
        assert other.marks is not None
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.marks, other.marks)


def test_texts_are_cut_and_never_markers() -> None:
    base = tiny_writer("gpt2")
    long = " ".join(f"w{i}" for i in range(30))
    pairs = (("name", long), ("area", "w1 w2"), ("response", ""))
    batch = teller(max_length=18, max_new_tokens=6).collate(
        base, [Example(("",), targets=(long,), segments=pairs)]
    )
    assert batch.marks is not None
    assert batch.inputs["input_ids"].shape[1] == 18
    assert batch.marks[0].tolist()[:12] == [0, 2, -1, -1, -1, -1, -1, -1, 3, -1, -1, 4]
    assert batch.inputs["input_ids"][0, 12:].tolist() == ids("w0 w1 w2 w3 w4 w5")


# --- the original, as plain code ------------------------------------------------------------------


class Original:
    """GPT-2 with the task's rows appended to its table, as the authors' code has it.

    Types are looked up in the same table (transformers' `token_type_ids` of GPT-2); an adapter
    after each block; every new row but the task's end is out of the scores.
    """

    def __init__(self, base: Base, rows: Tensor, adapters: dict[str, Tensor] | None) -> None:
        self.model = GPT2LMHeadModel(copy.deepcopy(base.config)).eval()
        self.model.load_state_dict(base.tower.state_dict())
        self.model.resize_token_embeddings(VOCAB + len(rows), mean_resizing=False)
        with torch.no_grad():
            self.model.transformer.wte.weight[VOCAB:] = rows
        if adapters:
            for layer, block in enumerate(self.model.transformer.h):
                block.register_forward_hook(self._hook(adapters, layer))

    @staticmethod
    def _hook(adapters: dict[str, Tensor], layer: int) -> Any:
        own = {n.rpartition(f"adapter.{layer}.")[2]: value for n, value in adapters.items()}

        def hook(_: nn.Module, __: Any, x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            normal = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            read = own["norm.weight"] * normal + own["norm.bias"]
            inner = (read @ own["down.weight"].T + own["down.bias"]).clamp(min=0)
            return x + inner @ own["up.weight"].T + own["up.bias"]

        return hook

    @torch.no_grad()
    def scores(self, tokens: list[int], types: list[int]) -> Tensor:
        """(S, V + 1): words, and the end."""
        found = self.model(
            input_ids=torch.tensor([tokens]), token_type_ids=torch.tensor([types])
        ).logits[0]
        return torch.cat([found[:, :VOCAB], found[:, VOCAB + 1 : VOCAB + 2]], dim=-1)

    def loss(self, example: Example) -> tuple[float, int]:
        tokens, types = self.source(example)
        answer = [*ids(example.targets[0]), VOCAB]
        told = self.scores(tokens + answer[:-1], types + [types[-1]] * (len(answer) - 1))
        told = told[len(tokens) - 1 :].log_softmax(-1)
        return float(-told[torch.arange(len(answer)), answer].sum()), len(answer)

    def written(self, example: Example, most: int) -> str:
        tokens, types = self.source(example)
        start = len(tokens)
        for _ in range(most):
            best = int(self.scores(tokens, types)[-1].argmax())
            if best in (VOCAB, ALL.index("[SEP]")):
                break
            tokens, types = [*tokens, best], [*types, types[-1]]
        return " ".join(ALL[i] for i in tokens[start:] if ALL[i] not in SPECIAL)

    @staticmethod
    def source(example: Example) -> tuple[list[int], list[int]]:
        tokens, types = [VOCAB], [VOCAB]
        for kind, text in example.segments:
            marker = VOCAB + 2 + KINDS.index(kind)
            tokens += [marker, *ids(text)]
            types += [marker] * (1 + len(text.split()))
        return tokens, types


@pytest.mark.parametrize("adapters", [False, True])
def test_it_is_the_original(adapters: bool) -> None:
    """Losses, and what is written greedily, of the resized and tied model."""
    base = tiny_writer("gpt2")
    read = teller()
    model = wired(base, read)
    rows = model.head.state_dict()["rows"]
    with attached(base, BLOCK if adapters else method("full"), read) as change:
        told = logits(model, base, EXAMPLES, labelled=True)
        texts = read.predictions(base, logits(model, base, EXAMPLES))
        packed = BLOCK.pack(base, change) if adapters else None
    original = Original(base, rows, packed)
    for found, example in zip(told, EXAMPLES, strict=True):
        loss, count = original.loss(example)
        assert found[0] == pytest.approx(loss, abs=2e-4)
        assert found[1] == count
    assert texts.tolist() == [original.written(example, 8) for example in EXAMPLES]
    assert len(set(texts)) > 1


def test_the_end_ends_a_text() -> None:
    """Likeliest where a text begins, or after its first token; without it more is written."""
    base, read = tiny_writer("gpt2", tie_word_embeddings=False), teller()
    model, example = wired(base, read), EXAMPLES[0]
    rows: Tensor = model.head.rows  # type: ignore[assignment]
    tokens, types = Original.source(example)
    whole = logits(model, base, [example])[0].long().tolist()
    assert whole[0] != whole[1]
    original = Original(base, rows.detach(), None).model.transformer
    with torch.no_grad():
        first, second = (
            original(
                torch.tensor([tokens + whole[:kept]]),
                token_type_ids=torch.tensor([types + [types[-1]] * kept]),
            ).last_hidden_state[0, -1]
            for kept in (0, 1)
        )
        # What says nothing where the first one stands, and much at the second.
        apart = second - (second @ first) / (first @ first) * first
        for kept, end in enumerate((first, apart)):
            rows[vectors.END] = 100 * end
            found = logits(model, base, [example])[0].long().tolist()
            assert found == [*whole[:kept], *[-1] * (8 - kept)]


# --- assertion 1: without a change, the base ------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_an_adapter_of_zeros_is_the_base(name: str) -> None:
    base = tiny_writer(name)
    tokens = torch.tensor([ids("w1 w2 w3 w4")])
    with torch.no_grad():
        before = base.tower(tokens).logits
        with method("adapter", placement="block", width=7, std=0.0).attach(base):
            assert torch.equal(base.tower(tokens).logits, before)
        off = vectors.put_on(base, torch.randn(5, HIDDEN))
        longer = base.tower(tokens).logits
        off()
        assert torch.equal(longer[..., :VOCAB], before)
        assert longer.shape[-1] == VOCAB + 1
        assert torch.equal(base.tower(tokens).logits, before)


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert", "t5", "bart", "deberta-v2"])
def test_blocks_of_other_kinds_have_adapters_behind_them(name: str) -> None:
    base = tiny_base(name)
    tokens = torch.tensor([ids("w1 w2 w3")])
    inner: list[tuple[Tensor, Tensor]] = []
    outer: list[Tensor] = []
    with attached(base, BLOCK, teller()) as change, torch.no_grad():
        block = base.body.get_submodule(base.anatomy.block_path(base.depth - 1))
        hooks = [
            change.parts["made"][f"adapter.{base.depth - 1}."].register_forward_hook(
                lambda _, read, made: inner.append((read[0], made))
            ),
            block.register_forward_hook(
                lambda _, __, made: outer.append(made[0] if isinstance(made, tuple) else made)
            ),
        ]
        base.body(tokens)
        for hook in hooks:
            hook.remove()
    assert len(inner) == len(outer) > 0
    for (read, made), whole in zip(inner, outer, strict=True):
        assert torch.equal(made, whole)
        assert (made - read).abs().max() > 1e-2


# --- assertion 2: what is frozen stays, bit for bit -----------------------------------------------


def tasks_of(count: int) -> dict[str, Task]:
    """Tasks that answer otherwise: each repeats other words of its source."""
    made = {}
    for number in range(count):
        kinds = (f"in{number}", f"out{number}") if number % 2 else ("source", "target")
        rows = []
        for at in range(24):
            words = [f"w{(7 * at + 3 * step + number) % 90}" for step in range(2 + at % 4)]
            answer = " ".join(words[number % 2 :: 2] or words[:1])
            text = " ".join(words)
            segments = ((kinds[0], text), (kinds[1], ""))
            rows.append(Example((text,), targets=(answer,), segments=segments))
        splits = {"train": rows[:16], "dev": rows[16:20], "test": rows[20:]}
        made[f"task{number}"] = Task(f"task{number}", splits, (), "bleu", "by a rule")
    return made


RECIPE = Recipe("vlm", BLOCK, readout("typed_segments", max_length=40, max_new_tokens=6)).override(
    epochs=6, batch_size=8, learning_rate=1e-2
)


def test_nothing_of_the_base_moves(tmp_path: Path) -> None:
    """AdamW with weight decay, on everything that trains."""
    base = tiny_writer("gpt2")
    before = {path: base.parameter(path).detach().clone() for path in base.paths()}
    task = tasks_of(1)["task0"]
    tuned = tune(
        base, task, RECIPE, out=tmp_path / f"a{SUFFIX}", weight_decay=0.1, learning_rate=3e-2
    )
    assert all(torch.equal(base.parameter(path), value) for path, value in before.items())
    held = sum(stream.count for stream in tuned.delta.streams)
    assert held == LAYERS * ((2 * HIDDEN + 1) * 5 + 3 * HIDDEN) + 4 * HIDDEN
    assert held == tuned.trainable


# The paper's five tasks on GPT-2 small: width, rows, and what the spec counts.
PAPER = {
    "translation": (300, 4, 5_563_920),
    "qa": (300, 5, 5_564_688),
    "summary": (100, 4, 1_875_120),
    "dialogue": (100, 5, 1_875_888),
    "table": (10, 11, 220_536),
}


def test_sizes_are_the_papers_on_its_model() -> None:
    """GPT-2 small's shape; numbers are counted, not computed, so that they need no memory."""
    with torch.device("meta"):
        tower = GPT2LMHeadModel(GPT2Config())
    base = Base("shape", tower, tiny_writer("gpt2").tokenizer, kind="causal_lm")
    own = sum(parameter.numel() for parameter in base.towers.parameters())
    assert own == 124_439_808
    held = 0
    for width, rows, expected in PAPER.values():
        how = method("adapter", placement="block", width=width, activation="relu")
        head = teller(kinds=tuple(f"kind{n}" for n in range(rows - 2))).attach(base, ())
        with how.attach(base) as change:
            numbers = [*change.trainable.values(), *head.parameters()]
            assert sum(value.numel() for value in numbers) == expected
        held += expected
    assert held == 15_100_152
    assert own + held <= 1.13 * own


# --- assertions 3 and 4: together as alone, and one after the other ------------------------------


@pytest.fixture(scope="module")
def five(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Base, dict[str, Task], dict[str, Delta]]:
    base, tasks = tiny_writer("gpt2"), tasks_of(5)
    folder = tmp_path_factory.mktemp("five")
    made = {}
    for number, (name, task) in enumerate(tasks.items()):
        path = folder / f"{name}{SUFFIX}"
        tune(base, task, RECIPE, out=path, seed=number, width=3 + number)
        made[name] = Delta.load(path)
    return base, tasks, made


def asked(tasks: dict[str, Task]) -> list[tuple[str, Example]]:
    """Rows of all tasks, in turns."""
    columns = [[(name, row) for row in task.splits["dev"]] for name, task in tasks.items()]
    return list(itertools.chain.from_iterable(zip(*columns, strict=True)))


def test_five_in_a_batch_write_what_each_writes_alone(five: Any) -> None:
    base, tasks, deltas = five
    rows = asked(tasks)
    alone = [predict(deltas[name], [row], base)[0]["text"] for name, row in rows]
    with combine(deltas, base) as together:
        found = [answer["text"] for answer in together.predict(rows)]
        back = [answer["text"] for answer in together.predict(rows[::-1])][::-1]
        runs: list[int] = []
        undo = surgery.rewire(base.body, _counting(base.body.forward, runs))
        together.predict(rows)
        undo()
    assert found == back == alone
    assert len(set(alone)) > len(tasks)
    assert set(runs) == {len(rows)}  # one pass for all rows at each step
    assert base.is_untouched()
    with combine(deltas, base, strict=True) as apart:
        assert [answer["text"] for answer in apart.predict(rows)] == alone


def _counting(run: Any, runs: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(len(kwargs["input_ids"]))
        return run(*args, **kwargs)

    return counted


def delta_of(base: Base, how: Method, read: Readout, seed: int) -> Delta:
    """A change that was never trained, of vectors and weights that matter."""
    model = wired(base, read, seed)
    with attached(base, how, read, seed) as change:
        return Delta.pack(base, how, change, read, model.head, (), "fp32")


MIXED: dict[str, tuple[Method, dict[str, Any]]] = {
    "block": (BLOCK, {}),
    "narrow": (replace(BLOCK, width=2), {}),  # type: ignore[type-var]
    "inner": (method("adapter", std=0.2, reduction=4), {}),
    "prefix": (method("prefix", length=3, hidden=0), {}),
    "prefix-long": (method("prefix", length=5, hidden=0), {}),
    "front": (method("prompt", init="normal", length=3), {}),
    "front-long": (method("prompt", init="normal", length=6), {"kinds": ("area", "name", "x")}),
    "rows": (method("select", train=("none",)), {}),
    "plain": (BLOCK, {"plain": True}),
    "weights": (method("mask", initial_sparsity=0.1), {}),
    "beams": (BLOCK, {"beams": 3}),
    "beams-plain": (method("prefix", length=2, hidden=0), {"beams": 3, "plain": True}),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_change_in_one_batch(name: str) -> None:
    """With and without vectors of their own, of other lengths, some of them by beams."""
    base = tiny_writer(name, tie_word_embeddings=False)
    deltas = {}
    for number, (kind, (how, settings)) in enumerate(MIXED.items()):
        if name == "gemma2" and kind.startswith("front"):
            continue  # a window, and padding between what is in front and a text: refused
        most = 4 + number % 4
        settings = dict(settings)
        if settings.pop("plain", False):
            read = readout("language_model", max_length=40, max_new_tokens=most, **settings)
        else:
            read = teller(max_new_tokens=most, **settings)
        deltas[kind] = delta_of(base, how, read, number)
    rows = [(kind, row) for row in EXAMPLES for kind in deltas]
    rows = [(kind, _renamed(row, deltas[kind])) for kind, row in rows]
    alone = [predict(deltas[kind], [row], base)[0]["text"] for kind, row in rows]
    with combine(deltas, base) as together:
        found = [answer["text"] for answer in together.predict(rows)]
        few = [answer["text"] for answer in together.predict(rows[5:7])]
    assert found == alone
    assert few == alone[5:7]
    assert len(set(alone)) > len(deltas)
    assert base.is_untouched()
    assert base.reserved == 0


def _renamed(row: Example, delta: Delta) -> Example:
    """With the answer's kind that the delta knows."""
    kinds = getattr(delta.readout, "kinds", KINDS)
    return replace(row, segments=(*row.segments[:-1], (kinds[-1], "")))


def test_training_one_task_leaves_the_others_alone(five: Any, tmp_path: Path) -> None:
    """Assertion 4: outputs of the first one, to the bit, before and after others were trained."""
    base, tasks, deltas = five
    first = tasks["task0"].splits["dev"]

    def told() -> Tensor:
        with deltas["task0"].applied(base) as model:
            return logits(model, base, first, labelled=True)

    before = told()
    tune(base, tasks["task1"], RECIPE, out=tmp_path / f"other{SUFFIX}", seed=9)
    assert torch.equal(told(), before)
    assert base.is_untouched()


def test_a_row_takes_no_part_in_another_tasks_gradients(five: Any) -> None:
    """Assertion 4: two tasks in one pass; a row's likelihood moves only what it wears."""
    base, tasks, deltas = five
    pair = {name: deltas[name] for name in ("task0", "task1")}
    batches = {n: d.readout.collate(base, tasks[n].splits["dev"], False) for n, d in pair.items()}
    made: list[Tensor] = []
    with combine(pair, base) as together:
        for module in base.towers.modules():
            for name, value in module.named_buffers(recurse=False):
                if name in ("down_weight", "up_weight", "norm_weight"):
                    made.append(value.requires_grad_())
        merged = mixed.merged(base, list(batches.values()), [0, 1], left=True)
        with batches_of.running(merged):
            state = base.body(**merged.inputs).last_hidden_state
        state[: len(tasks["task0"].splits["dev"])].sum().backward()
        assert together is not None
    assert len(made) == 3 * LAYERS
    for table in made:
        assert table.grad is not None
        assert table.grad[0].abs().max() > 0
        assert not table.grad[1:].any()


# --- as a product ---------------------------------------------------------------------------------


def test_texts_as_they_are_written(five: Any) -> None:
    base, tasks, deltas = five
    rows = asked(tasks)
    with combine(deltas, base) as together:
        whole = [answer["text"] for answer in together.predict(rows)]
        pieces = list(together.stream(rows))
        several = [place for place, _ in pieces]
        assert several != sorted(several)  # in turns
        told = ["".join(words for at, words in pieces if at == n) for n in range(len(rows))]
        assert told == whole
        for _ in together.stream(rows):  # left early: the writing stops, and the base is free
            break
        assert [answer["text"] for answer in together.predict(rows[:2])] == whole[:2]
        with pytest.raises(SettingError, match="task 'nobody' is unknown"):
            next(together.stream([("nobody", "w1")]))


@pytest.mark.parametrize("own", [False, True])
def test_leaving_the_context_ends_a_stream(own: bool) -> None:
    """Whoever reads on is told; the base is what it was, also where a pass of its own was cut."""
    base, row = tiny_writer("gpt2"), EXAMPLES[0]
    read = teller(max_length=60, max_new_tokens=40)
    other = method("mask", initial_sparsity=0.1) if own else BLOCK
    deltas = {"one": delta_of(base, BLOCK, read, 1), "asked": delta_of(base, other, read, 2)}
    text = predict(deltas["asked"], [row], base)[0]["text"]
    assert len(text.split()) > 20  # it is not at its end when the context is left
    with combine(deltas, base) as together:
        stream = together.stream([("asked", row)] * 3)
        next(stream)
    with pytest.raises(SettingError, match="context was left while texts were written"):
        list(stream)
    assert base.is_untouched()
    assert not any("forward" in module.__dict__ for module in base.towers.modules())
    assert predict(deltas["asked"], [row], base)[0]["text"] == text


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_short_text_is_not_pushed_beyond_the_positions(name: str) -> None:
    """A long source with a short answer, beside a long answer: 64 positions for both."""
    base = tiny_writer(name)
    short, long = (
        readout("language_model", max_length=64, max_new_tokens=most) for most in (4, 40)
    )
    deltas = {
        "short": delta_of(base, BLOCK, short, 1),
        "long": delta_of(base, BLOCK, long, 2),
        "other": delta_of(base, BLOCK, teller(), 3),
    }
    rows = [("short", " ".join(f"w{n}" for n in range(58))), ("long", "w1"), ("other", "name : w2")]
    alone = [predict(deltas[task], [text], base)[0]["text"] for task, text in rows]
    with combine(deltas, base) as together:
        assert [answer["text"] for answer in together.predict(rows)] == alone


def test_a_batch_of_ones_own_must_share_a_pass(five: Any) -> None:
    base, tasks, deltas = five
    rows = tasks["task0"].splits["dev"]
    beams = delta_of(base, BLOCK, replace(deltas["task0"].readout, beams=3), 1)
    full = delta_of(base, method("mask", initial_sparsity=0.1), deltas["task0"].readout, 3)
    made = {"one": deltas["task0"], "beams": beams, "full": full}
    batch = deltas["task0"].readout.collate(base, rows, labelled=False)
    with deltas["task0"].applied(base) as model:
        alone = logits(model, base, rows).long()
    with combine(made, base) as together:
        assert torch.equal(together.run({"one": batch})["one"].long(), alone)
        for names in (("one", "beams"), ("full",), ()):
            with pytest.raises(SettingError, match="have no pass in common"):
                together.run(dict.fromkeys(names, batch))
        for bad in ("a", [("one",)], [("one", "w1", "w2")]):
            with pytest.raises(SettingError, match="expected a pair of a task and a text"):
                together.predict(bad)  # type: ignore[arg-type]
    for bad in (["x.delta.safetensors"], [full]):
        with pytest.raises(SettingError, match="expected a pair of a name and a delta"):
            combine(bad, base)  # type: ignore[arg-type]


def test_tasks_that_answer_otherwise_are_told_apart(tmp_path: Path) -> None:
    """Learned together: what is written differs from row to row, and a bare text can't say."""
    one, other = tasks_of(2).values()
    both = {s: [*one.splits[s], *other.splits[s]] for s in one.splits}
    task, base = Task("both", both, (), "bleu", "by rules"), tiny_writer("gpt2")
    tuned = tune(base, task, RECIPE, out=tmp_path / f"a{SUFFIX}", max_steps=2)
    read = tuned.delta.readout
    assert (read.kinds, read.answers) == (("source", "in1", "target", "out1"), 2)
    assert len(predict(tuned.path, [one.splits["dev"][0], other.splits["dev"][0]], base)) == 2
    with pytest.raises(TaskError, match="does not say what is to be written, of target, out1"):
        predict(tuned.path, ["w1 w2"], base)


def test_tokens_that_the_model_has_no_vector_for() -> None:
    base, read = tiny_writer("gpt2"), teller()
    base.tokenizer.add_tokens(["NEW"])
    with pytest.raises(TaskError, match="holds 'NEW', which the tokenizer knows"):
        read.collate(base, [Example(("name : NEW w1",))], labelled=False)
    with pytest.raises(TaskError, match="holds 'NEW', which the tokenizer knows"):
        read.collate(base, [replace(EXAMPLES[0], targets=("w1 NEW",))])


def test_settings_of_one_name_are_told_apart() -> None:
    recipe = Recipe("x", method("adapter"), readout("language_model"))
    found = recipe.override(readout_reduction="examples", reduction=8)
    assert (found.readout.reduction, found.method.reduction) == ("examples", 8)  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match="has no setting 'readout_kinds'"):
        recipe.override(readout_kinds="a")


def test_a_stream_of_a_pass_of_its_own(five: Any) -> None:
    base, tasks, deltas = five
    full = delta_of(base, method("mask", initial_sparsity=0.1), deltas["task0"].readout, 3)
    rows = [(name, row) for row in tasks["task0"].splits["dev"] for name in ("full", "task0")]
    with combine({"full": full, "task0": deltas["task0"]}, base) as together:
        whole = [answer["text"] for answer in together.predict(rows)]
        pieces = list(together.stream(rows))
    assert ["".join(w for at, w in pieces if at == n) for n in range(len(rows))] == whole


def test_the_page_on_streaming_is_true(five: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, deltas = five
    page = (Path(__file__).parent.parent / "docs" / "combine.md").read_text()
    (snippet,) = (part for part in page.split("```python\n")[1:] if "tasks.stream" in part)
    own = type("howfine", (), {"combine": staticmethod(lambda files: combine(files, base))})
    names = {"e2e.delta.safetensors": deltas["task0"], "en-de.delta.safetensors": deltas["task2"]}
    code = snippet.split("```")[0]
    for file in names:
        code = code.replace(f'"{file}"', f"files[{file!r}]")
    code = code.replace("name : Aromi", "w1 w2 w3").replace("a dog in the snow", "w4 w5")
    exec(compile(code, "combine.md", "exec"), {"howfine": own, "files": names})
    said = capsys.readouterr().out.split("\n")
    assert {line[0] for line in said if line} == {"0", "1"}


def test_a_task_is_learned_and_scored(tmp_path: Path) -> None:
    """All of it on a task that a tiny model learns by heart; kinds come from the examples."""
    base, task = tiny_writer("gpt2"), tasks_of(2)["task1"]
    recipe = RECIPE.override(epochs=80, width=32, learning_rate=2e-2)
    tuned = tune(base, task, recipe, out=tmp_path / f"a{SUFFIX}")
    assert tuned.delta.readout.kinds == ("in1", "out1")
    score = evaluate(tuned.path, base, task, split="train")
    assert score.scores["perplexity"] < 2
    assert score.scores["rouge_l"] > 60
    again = Delta.load(tuned.path)
    assert again.header()["readout"]["typed_segments"]["kinds"] == ["in1", "out1"]


def test_plain_texts_are_a_source_and_a_target(tmp_path: Path) -> None:
    base, task = tiny_writer("llama"), tasks_of(1)["task0"]
    bare = {s: [replace(row, segments=()) for row in rows] for s, rows in task.splits.items()}
    plain = Task("plain", bare, (), "bleu", "by a rule")
    one = tune(base, plain, RECIPE, out=tmp_path / f"a{SUFFIX}")
    two = tune(base, task, RECIPE, out=tmp_path / f"b{SUFFIX}")
    assert one.score.value == two.score.value
    assert [s.coded for s in one.delta.streams] == [s.coded for s in two.delta.streams]


def test_what_is_wrong_is_said() -> None:
    base, read = tiny_writer("gpt2"), teller()
    with pytest.raises(TaskError, match="kind 'food', for which there is no vector"):
        read.collate(base, [Example(("",), segments=(("food", "w1"), ("response", "")))], False)
    with pytest.raises(TaskError, match="begins with none of the kinds"):
        read.collate(base, [Example(("w1 w2",))], labelled=False)
    with pytest.raises(TaskError, match="has no text to be written"):
        read.collate(base, [replace(EXAMPLES[0], targets=())])
    with pytest.raises(TaskError, match="holds .SEP., which ends it"):
        read.collate(base, [replace(EXAMPLES[0], targets=("w1 [SEP]",))])
    with pytest.raises(SettingError, match="3 segments take 4 of 4 tokens and leave no room"):
        teller(max_length=8, max_new_tokens=4).collate(base, EXAMPLES, labelled=False)
    with pytest.raises(SettingError, match="max_new_tokens 64 leaves no room"):
        teller(max_length=200, max_new_tokens=64).attach(base, ())
    with pytest.raises(SettingError, match="expected names that differ"):
        teller(kinds=("a", "b", "a"))
    with pytest.raises(SettingError, match="needs a base of kind causal_lm"):
        read.attach(tiny_base("bert"), ())
    delta = delta_of(base, BLOCK, read, 0)
    with pytest.raises(SettingError, match="two deltas are named 'one'"):
        combine([("one", delta), ("one", delta)], base)
    with combine({"one": delta}, base) as tasks:
        with pytest.raises(SettingError, match="task 'two' is unknown"):
            tasks.predict([("two", "name : w1")])
        with pytest.raises(TaskError, match="begins with none of the kinds"):
            tasks.predict([("one", "w1")])
    beams = delta_of(base, BLOCK, teller(beams=2), 0)
    with combine({"b": beams}, base) as tasks, pytest.raises(SettingError, match="with beams"):
        next(tasks.stream([("b", "name : w1")]))
