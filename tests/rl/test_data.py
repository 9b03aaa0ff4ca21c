"""Files of rows: what is read, and the file and line of what is not."""

import codecs
import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from qrm_fast.rl.data import (
    Demonstration,
    Example,
    Message,
    Pair,
    Prompt,
    fit,
    fit_rows,
    read_rows,
    texts,
    unequal_pairs,
    write_jsonl,
)

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
ASKED = (Message("user", "q"),)


def test_rows_survive_writing_and_reading(tmp_path):
    for rows in (
        [Example("1+1:", "02"), Example("ü\n\u2028", "x")],
        [Pair("p", "good", "bad")],
        [Demonstration("p", "r")],
        [Prompt((Message("system", "s"), Message("user", "q"))), Prompt("p")],
    ):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        assert read_rows(tmp_path / "rows.jsonl", type(rows[0])) == rows


def write(path, *lines, start=b"", encoding="utf-8"):
    path.write_bytes(
        start + "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode(encoding)
    )
    return path


GOOD = Pair("p", "good", "bad")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "chosen": "b"', "expected one JSON object per line, got"),
        ('["a"]', "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"instruction": "a", "chosen": "b"}', r"expected a string field 'rejected', got only \['ch"),
        ('{"instruction": "a", "chosen": 3, "rejected": "c"}', "expected a string field 'chosen', got int"),
        (
            '{"chosen": "b", "rejected": "c"}',
            "expected a string field 'instruction' or 'prompt' or 'question', got only",
        ),
        ("[" * 100_000, "expected one JSON object per line, got one nested too deeply"),
        ('{"a":' * 100_000, "expected one JSON object per line, got one nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "expected one JSON object per line, got"),
        ({"prompt": "\ud800", "chosen": "b", "rejected": "c"}, r"'instruction', got the lone surrogate '\\ud800'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c\udfff"}, r"'rejected', got the lone surrogate '\\udfff'"),
        ({"prompt": [dict(QUESTION, content="\ud801")], "chosen": "b", "rejected": "c"}, r"surrogate '\\ud801'"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "pairs.jsonl", GOOD._asdict(), line)
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*{message}"):
        read_rows(path, Pair)


def test_byte_order_marks_and_blank_lines_say_nothing(tmp_path):
    first, second = GOOD._asdict(), Pair("p", "x", "y")._asdict()
    path = write(tmp_path / "pairs.jsonl", "", first, "", "  \t ", "\r", second, "", " ", start=codecs.BOM_UTF8)
    rows = read_rows(path, Pair)
    assert rows == [GOOD, Pair("p", "x", "y")]
    assert rows.places == [f"{path}:2", f"{path}:6"]
    write(path, first, "", "   ", "{", second)
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: expected one JSON object per line"):
        read_rows(path, Pair)
    path.write_bytes(json.dumps(first).encode() + b"\r\n\r\n" + json.dumps(second).encode() + b"\r\n")
    assert len(read_rows(path, Pair)) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift_jis"])
def test_other_encodings_are_named_by_file_and_line(tmp_path, encoding):
    text = "ソ" if encoding == "shift_jis" else "ü"
    line = json.dumps(Example(f"{text}", "1")._asdict(), ensure_ascii=False)
    path = write(tmp_path / "rows.jsonl", line, line, encoding=encoding)
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: expected (UTF-8 text, got the byte 0x|one JSON object per line)"
    ):
        read_rows(path, Example)


def test_compressed_files_and_late_bytes(tmp_path):
    path, line = tmp_path / "rows.jsonl", json.dumps(Example("p", "1")._asdict()).encode()
    path.write_bytes(gzip.compress(line))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: expected UTF-8 text, got the byte 0x8b: files in UTF-16, in"):
        read_rows(path, Example)
    path.write_bytes(line + b"\n" + line.replace(b"p", b"\xe9"))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: expected UTF-8 text, got the byte 0xe9"):
        read_rows(path, Example)


def test_empty_and_missing_files(tmp_path):
    for content in (b"", b"\n \n", codecs.BOM_UTF8):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"empty.jsonl: expected at least one row, got an empty file"):
            read_rows(tmp_path / "empty.jsonl", Example)
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl"):
        read_rows(tmp_path / "missing.jsonl", Example)


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ({"prompt": "p"}, Prompt("p")),
        ({"prompt": [QUESTION]}, Prompt(ASKED)),
        (
            {"prompt": [SYSTEM, QUESTION, ANSWER, QUESTION]},
            Prompt(tuple(Message(**m) for m in (SYSTEM, QUESTION, ANSWER, QUESTION))),
        ),
        ({"question": "p", "answer": "#### 3"}, Example("p", "#### 3")),  # GSM8K
        ({"prompt": "p", "solution": "3"}, Example("p", "3")),
        ({"prompt": "p", "instruction": None, "label": "3", "answer": "4"}, Example("p", "3")),
        ({"prompt": "p", "completion": "r"}, Demonstration("p", "r")),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, Demonstration(ASKED, "a")),
        ({"messages": [SYSTEM, QUESTION, ANSWER]}, Demonstration((Message("system", "s"), *ASKED), "a")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Pair("p", "a", "b")),
        ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]}, Pair(ASKED, "a", "b")),
        ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}, Pair(ASKED, "a", "b")),
        ({"prompt": "q", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}, Pair(ASKED, "a", "b")),
    ],
)
def test_columns_of_trl(tmp_path, fields, row):
    assert read_rows(write(tmp_path / "rows.jsonl", fields), type(row)) == [row]
    hash(row)  # the split of held-out pairs is by prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [], "label": "1"}, "expected at least one message in 'instruction', got none"),
        ({"prompt": ["q"], "label": "1"}, "expected messages with a role and a content in 'instruction', got str"),
        ({"prompt": [{"role": "robot", "content": "q"}], "label": "1"}, "got role 'robot' and content str"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "label": "1"}, "and content list"),
        ({"prompt": [QUESTION, ANSWER], "label": "1"}, "last message of a prompt must not be the assistant's"),
        (
            {"prompt": [QUESTION], "label": [ANSWER]},
            "expected a string field 'label' or 'answer' or 'solution', got list",
        ),
        (
            {"prompt": "p", "chosen": [QUESTION], "rejected": "b"},
            "last message of 'chosen' must be the assistant's, got 'user'",
        ),
        (
            {"chosen": [QUESTION, ANSWER], "rejected": [SYSTEM, QUESTION, OTHER]},
            "expected the same prompt before every",
        ),
        (
            {"prompt": "p", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
            "expected the same prompt before",
        ),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "expected a string field 'instruction' or"),
    ],
)
def test_messages_that_are_no_conversation(tmp_path, fields, message):
    row = Pair if "chosen" in fields else Example
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{message}"):
        read_rows(write(tmp_path / "rows.jsonl", fields), row)


def test_data_sets_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise RuntimeError("Dataset 'no/such' doesn't exist")
        return iter([{"question": "q", "answer": "#### 1"}, {"question": "q"}][: 1 if split == "train" else 2])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows("hf:openai/gsm8k/main", Example)
    assert rows == [Example("q", "#### 1")] and rows.places == ["hf:openai/gsm8k/main:1"]
    with pytest.raises(ValueError, match="hf:some/set:test:2: expected a string field 'label' or 'answer'"):
        read_rows("hf:some/set:test", Example)
    assert asked == [("openai/gsm8k", "main", "train"), ("some/set", None, "test")]
    with pytest.raises(ValueError, match=r"hf:no/such: the hub has no such data set: Dataset 'no/such' doesn't exist"):
        read_rows("hf:no/such", Example)
    for spec in "hf:gsm8k", "hf:a/b/c/d", "hf:", "hf:a/b/c:":
        with pytest.raises(ValueError, match="must be named hf:OWNER/NAME, or hf:OWNER/NAME/CONFIG:SPLIT"):
            read_rows(spec, Example)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(ValueError, match=r"need the package datasets, pip install 'qrm_fast\[hub\]'; files"):
        read_rows("hf:openai/gsm8k/main", Example)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    path = tmp_path / "rows.parquet"
    fields = [{"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [dict(OTHER, content=str(i))]} for i in range(5)]
    parquet.write_table(Table.from_pylist(fields), path, row_group_size=2)
    rows = read_rows(path, Pair)
    assert rows == [Pair(ASKED, "a", str(i)) for i in range(5)] and rows.places[4] == f"{path}:5"
    parquet.write_table(Table.from_pylist([{"prompt": "p", "label": "1"}, {"prompt": "p"}]), path)
    with pytest.raises(ValueError, match=r"rows.parquet:2: expected a string field 'label'"):
        read_rows(path, Example)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"rows.parquet: expected a parquet file, got"):
        read_rows(path, Example)
    with pytest.raises(FileNotFoundError, match=r"missing.parquet"):
        read_rows(tmp_path / "missing.parquet", Example)


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"rows.parquet: parquet files need the package pyarrow, pip install .qrm_fast\["
    ):
        read_rows(tmp_path / "rows.parquet", Example)


def test_a_check_is_named_by_file_and_line(tmp_path):
    def check(row):
        if row.label == "2":
            raise ValueError("no twos")

    path = write(tmp_path / "rows.jsonl", "", {"prompt": "p", "label": "1"}, {"prompt": "p", "label": "2"})
    with pytest.raises(ValueError, match=r"rows.jsonl:3: no twos"):
        read_rows(path, Example, check=check)


def test_texts_of_rows():
    assert list(texts([Pair("p", "a", "b"), Pair((Message("system", "s"), *ASKED), "c", "d")])) == list("pabsqcd")


def test_what_is_cut_is_counted():
    prompts, places = [[1, 2], [1], [1, 2, 3]], ["f:1", "f:2", "f:4"]
    responses = [[3], [4] * 10_000_000, [5, 6]]
    with pytest.warns(UserWarning, match="2 of 3 responses are cut to 4 tokens .* f:2, the longest has 10000001"):
        sequences = fit_rows(prompts, responses, 4, places)
    assert sequences == [[1, 2, 3], [1, 4, 4, 4], [1, 2, 3, 5]]
    assert sequences == [fit(*row, 4, "") for row in zip(prompts, responses, strict=True)]
    with pytest.raises(ValueError, match="f:4: a prompt must leave room for a response in 3 tokens, got 3"):
        fit_rows(prompts, responses, 3, places)


def test_nothing_cut_is_not_worth_a_word(recwarn):
    assert fit_rows([[1]], [[2, 3]], 3, ["f:1"]) == [[1, 2, 3]]
    assert unequal_pairs([Pair("p", "a", "b")], ["f:1"]) == [0]
    assert not recwarn.list


def test_pairs_of_equal_sides_are_left_out_and_counted():
    pairs = [Pair("p", [1, 2], [1, 3]), Pair("p", [1, 2], [1, 2]), Pair("p", [1], [1, 2]), Pair("p", [], [])]
    with pytest.warns(UserWarning, match="2 of 4 pairs have two equal sides within max_len tokens .* first is f:3"):
        assert unequal_pairs(pairs, ["f:1", "f:3", "f:4", "f:5"]) == [0, 2]
    with pytest.raises(ValueError, match="f:3: expected pairs of different answers, but 1 of 1 pairs"):
        unequal_pairs(pairs[1:2], ["f:3"])
