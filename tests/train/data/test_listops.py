"""ListOps: what an expression comes to, which are drawn, how rows carry them, and what keeps the splits apart."""

import hashlib
import itertools
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels.errors import ConfigError
from zoo.train.data import IGNORE, SPLITS, DataModule, ListOpsConfig, create_source
from zoo.train.data.expressions import (
    FORMAT,
    OPERATORS,
    PADDING,
    READ_OUT,
    SYMBOLS,
    Expressions,
    Grammar,
    _evaluate,
    generate,
)
from zoo.train.data.listops import PRESETS

APPLY = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda arguments: int(statistics.median(arguments)),
    "[SM": lambda arguments: sum(arguments) % 10,
}


def solve(tokens):
    """Value and nesting of an expression, by a stack machine that reads the written tokens from left to right."""
    stack, nesting = [[]], 0
    for token in tokens:
        symbol = SYMBOLS[token]
        if symbol in APPLY:
            stack.append([symbol])
            nesting = max(nesting, len(stack) - 1)
        elif symbol == "]":
            operator, *arguments = stack.pop()
            stack[-1].append(APPLY[operator](arguments))
        else:
            stack[-1].append(int(symbol))
    ((value,),) = stack
    return value, nesting


def write(text):
    return [SYMBOLS.index(symbol) for symbol in text.split()]


@pytest.mark.parametrize(
    ("text", "value", "nesting"),
    [
        ("[MAX 4 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5, 2),
        ("[MED 1 2 ]", 1, 1),  # 1.5, truncated
        ("[MED 7 0 9 8 ]", 7, 1),  # 7.5
        ("[SM 9 8 [SM 7 7 ] ]", 1, 2),
    ],
)
def test_the_solver_by_hand(text, value, nesting):
    assert solve(write(text)) == (value, nesting)


def test_operators_by_hand():
    values = np.array([3, 1, 2, 9, 8, 0, 5, 9, 9])
    arguments = np.array([3, 2, 4])
    for operator, expected in (("MIN", [1, 8, 0]), ("MAX", [3, 9, 9]), ("MED", [2, 8, 7]), ("SM", [6, 7, 3])):
        symbols = np.full(3, SYMBOLS.index(f"[{operator}"))
        assert _evaluate(symbols, arguments, np.array([0, 3, 5]), values).tolist() == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stack_machine_finds_every_value(preset):
    grammar = PRESETS[preset].grammar
    found = generate(grammar, 1_000, "test", 3)
    assert [solve(tokens) for tokens in found.tokens] == list(zip(found.values, found.depths, strict=True))
    assert {len(tokens) for tokens in found.tokens} <= set(range(grammar.min_length, grammar.max_length + 1))
    assert max(found.depths) == grammar.max_depth - 1
    arguments = Counter(len(operator) - 1 for tokens in found.tokens for operator in operators(tokens))
    assert set(arguments) == set(range(2, grammar.max_arguments + 1))


def operators(tokens):
    """Each operator of an expression with its arguments in a list: a closed one counts as one argument."""
    stack = []
    for token in tokens:
        if SYMBOLS[token] in APPLY:
            if stack:
                stack[-1].append(token)
            stack.append([token])
        elif SYMBOLS[token] == "]":
            yield stack.pop()
        else:
            stack[-1].append(token)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(2, 6),
    st.integers(1, 20),
    st.sampled_from(SPLITS),
    st.integers(0, 2**64),
    st.floats(0.1, 0.5),
)
def test_any_grammar(max_depth, max_arguments, num_examples, split, seed, share):
    grammar = Grammar(max_depth, max_arguments, 4, 100, share)
    found = generate(grammar, num_examples, split, seed)
    assert [solve(tokens) for tokens in found.tokens] == list(zip(found.values, found.depths, strict=True))
    assert max(map(len, found.tokens)) <= grammar.longest


def test_expressions_are_as_likely_as_the_grammar_says():
    """Against trees drawn one by one; lengths, nesting and the outermost operator come out the same."""
    random = np.random.default_rng(0)

    def draw(depth):
        if depth < 4 and (depth == 1 or random.random() < 0.25):
            return [
                random.integers(4) + 10,
                *itertools.chain(*(draw(depth + 1) for _ in range(random.integers(2, 5)))),
                14,
            ]
        return [random.integers(10)]

    drawn = [tokens for tokens in (draw(1) for _ in range(8_000)) if 12 <= len(tokens) <= 32]
    found = generate(Grammar(4, 4, 12, 32), len(drawn), "train", 1)
    for measure in (
        lambda tokens: len(tokens) // 6,
        lambda tokens: solve(tokens)[1],
        lambda tokens: SYMBOLS[tokens[0]],
        lambda tokens: SYMBOLS[tokens[1]],
        lambda tokens: solve(tokens)[0],
    ):
        ours, theirs = (Counter(map(measure, expressions)) for expressions in (found.tokens, drawn))
        for key in ours | theirs:
            # some thousand of each: five deviations of a share of one half are 6 %
            assert ours[key] / len(drawn) == pytest.approx(theirs[key] / len(drawn), abs=0.05), (key, ours, theirs)


def test_expressions_of_this_format_are_pinned():
    # The cache is found by FORMAT: when this hash has to change, FORMAT has to change with it. Every process, whatever
    # it did before, comes to the same bytes.
    tokens = [t.tobytes() for split in SPLITS for t in generate(PRESETS["nano"].grammar, 100, split, 7).tokens]
    assert (FORMAT, hashlib.sha256(b"|".join(tokens)).hexdigest()[:16]) == (2, "0e20acd9aee50712")


def test_splits_and_seeds_have_streams_of_their_own():
    def drawn(split, seed):
        return [t.tobytes() for t in generate(PRESETS["lra"].grammar, 20, split, seed).tokens]

    assert not set(drawn("validation", 7)) & set(drawn("test", 7))
    assert not set(drawn("validation", 7)) & set(drawn("validation", 8))
    assert drawn("validation", 7) == drawn("validation", 7)


def test_no_expression_comes_twice_in_or_across_splits():
    # [OP a b ] alone: 400 expressions, so that draws meet again and again.
    seen = {split: [t.tobytes() for t in _all_short(split).tokens] for split in SPLITS}
    together = list(itertools.chain(*seen.values()))
    assert len(set(together)) == len(together) == 370
    tiny = PRESETS["tiny"].grammar
    splits = {split: [t.tobytes() for t in generate(tiny, 2_000, split, 0).tokens] for split in SPLITS}
    for tokens in splits.values():
        assert len(set(tokens)) == len(tokens)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(splits[one]) & set(splits[other])


def _all_short(split) -> Expressions:
    return generate(Grammar(2, 2, 4, 4), {"train": 300, "validation": 35, "test": 35}[split], split, 0)


def test_too_few_expressions_are_one_clear_line():
    with pytest.raises(ConfigError, match=r"found \d+ different train expressions of 4 to 4 tokens in [\d,]+ draws"):
        generate(Grammar(2, 2, 4, 4), 400, "train", 0)


def test_trees_that_outgrow_the_length_are_cut_not_kept_and_not_grown():
    """Every argument an operator: whole trees would have 100^20 nodes."""
    with pytest.raises(ConfigError, match="found 0 different"):
        generate(Grammar(21, 100, 50, 60, 1.0), 1, "train", 0)
    found = generate(Grammar(20, 10, 300, 400, 0.2), 50, "train", 0)
    assert [solve(tokens) for tokens in found.tokens] == list(zip(found.values, found.depths, strict=True))


def test_no_global_random_state_is_read_or_moved():
    before = np.random.get_state()[1].copy()  # noqa: NPY002  numpy's global generator is what must stay still
    generate(Grammar(3, 3, 5, 30), 20, "train", 11)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.fixture(scope="module")
def nano():
    return create_source(ListOpsConfig(num_examples=6_000, validation_examples=60, test_examples=600))


def rows(source, split):
    for table in source.load(split):
        columns = table.with_format("numpy")[:]
        for i in range(len(table)):
            yield {name: column[i] for name, column in columns.items()}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_padding_an_expression_and_the_read_out(nano, split):
    found = generate(nano.config.grammar, nano.config.examples(split), split, 0)
    expected = {t.tobytes(): (v, d) for t, v, d in zip(*found, strict=True)}
    for row in rows(nano, split):
        inputs, targets, segments = (row[name].astype(int) for name in ("inputs", "targets", "segment_ids"))
        start = int((inputs == PADDING).sum())
        tokens = inputs[start:-1]
        assert (inputs[:start] == PADDING).all()
        assert inputs[-1] == READ_OUT == tokens.max(initial=0) + 1
        assert (targets[:-1] == IGNORE).all()
        assert segments.tolist() == [0] * start + [1] * (len(inputs) - start)
        assert expected.pop(tokens.astype(np.uint8).tobytes()) == (targets[-1], row["slice_depth"])
        assert solve(tokens) == (targets[-1], row["slice_depth"])
        assert f"[{OPERATORS[row['slice_root']]}" == SYMBOLS[tokens[0]]
        assert start < PRESETS["nano"].step
    assert not expected


def test_what_the_trainer_is_told(nano):
    assert (nano.name, nano.vocab_size, len(SYMBOLS)) == ("listops", 17, 17)
    assert nano.slice_values == {"depth": [1, 2, 3, 4], "root": [0, 1, 2, 3]}
    assert nano.unit is nano.codec is nano.bytes_per_label("test") is None
    assert nano.facts() == {"preset": "nano", "data_seed": 0}
    assert (nano.batch_size, nano.eval_batch_size, nano.shuffle) == (64, 512, True)


def test_batches_have_slices_and_documents(nano):
    batch = DataModule(nano.config, seed=0).train_dataloader().batch(0)
    assert batch.keys() == {"inputs", "targets", "segment_ids", "slices", "digest"}
    assert batch["slices"].keys() == {"depth", "root"}
    assert batch["inputs"].shape == batch["targets"].shape == batch["segment_ids"].shape
    assert ((batch["targets"] != IGNORE).sum(1) == 1).all()


def test_levels_are_what_the_two_rules_score(nano):
    by_root, everything = {root: Counter() for root in range(4)}, Counter()
    for row in rows(nano, "train"):
        by_root[row["slice_root"]][row["targets"][-1]] += 1
        everything[row["targets"][-1]] += 1
    majority = root = 0
    for row in rows(nano, "test"):
        majority += everything.most_common(1)[0][0] == row["targets"][-1]
        root += by_root[row["slice_root"]].most_common(1)[0][0] == row["targets"][-1]
    assert nano.levels == {"majority": majority / 600, "root": root / 600}


@pytest.mark.parametrize(
    ("preset", "majority", "root", "examples"),
    [("nano", 0.12, 0.25, 20_000), ("tiny", 0.11, 0.22, 20_000), ("lra", 0.174, 0.370, 5_000)],
)
def test_the_rules_score_what_is_known_of_each_size(preset, majority, root, examples):
    """Both rules on the examples they are made from, as the known figures are."""
    found = generate(PRESETS[preset].grammar, examples, "train", 0)
    pairs = Counter((tokens[0], value) for tokens, value in zip(found.tokens, found.values, strict=True))
    values = Counter(found.values)
    best = sum(max(n for (first, _), n in pairs.items() if first == operator) for operator in range(10, 14))
    assert max(values.values()) / examples == pytest.approx(majority, abs=0.015)
    assert best / examples == pytest.approx(root, abs=0.015)


def test_a_row_can_be_as_short_as_the_shortest_expression():
    config = ListOpsConfig(max_depth=2, max_arguments=2, min_length=4, max_length=4, num_examples=20, test_examples=5)
    assert [table.with_format("numpy")[:]["inputs"].shape for table in create_source(config).load("train")] == [(20, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "lar"}, "data.preset=lar is not valid: did you mean 'lra'"),
        ({"min_length": 65}, "data.min_length=65 is above data.max_length=64"),
        ({"max_depth": 2}, "at most 7 tokens"),
        ({"max_depth": 1}, "data.max_depth=1 is not valid: expected at least 2"),
        ({"max_arguments": 1}, "expected at least 2"),
        ({"operator_share": 1.5}, "expected at most 1"),
        ({"data_seed": -1}, "expected at least 0"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        ListOpsConfig(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
