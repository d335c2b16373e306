import hashlib
import json
import os
import random
import struct
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_pm.errors import UserError
from hf_pm.store.tensorfiles import (
    DTYPES,
    Stored,
    allocate,
    copy_range,
    overwrite,
    read_header,
    read_tensor,
    write_at,
    write_streaming,
)


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator).bfloat16(),
        "after": torch.randn(2, 3, 4, generator=generator),  # begins at an odd multiple of two bytes
        "number": torch.tensor(7),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 3, generator=generator).T,
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


def specs(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def same(first, second):
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def test_what_is_written_streaming_is_what_safetensors_reads(tmp_path):
    path, tensors = tmp_path / "streamed.safetensors", some_tensors()
    digest = write_streaming(path, specs(tensors), tensors.items(), {"note": "kept"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"note": "kept"}
    assert [path.name for path in tmp_path.iterdir()] == ["streamed.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_the_one_of_the_format(tmp_path, dtype):
    tensor = torch.arange(6).to(torch.float32).to(dtype).reshape(2, 3)
    write_streaming(tmp_path / "ours", {"x": (dtype, (2, 3))}, [("x", tensor)])
    save_file({"x": tensor}, tmp_path / "theirs")
    for file in ("ours", "theirs"):
        where = read_header(tmp_path / file).tensors["x"]
        assert (where.dtype, where.shape) == (dtype, (2, 3))
        assert same(load_file(tmp_path / file)["x"].view(torch.uint8), tensor.view(torch.uint8))
        assert same(read_tensor(tmp_path / file, where).view(torch.uint8), tensor.view(torch.uint8))


def test_one_tensor_is_alive_at_a_time(tmp_path):
    alive = weakref.WeakSet()

    def tensors():
        for name in "abcd":
            tensor = torch.full((64, 64), float(ord(name)))
            alive.add(tensor)
            assert len(alive) == 1
            yield name, tensor
            del tensor

    write_streaming(tmp_path / "file", dict.fromkeys("abcd", (torch.float32, (64, 64))), tensors())
    assert load_file(tmp_path / "file")["d"][0, 0] == ord("d")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "'b' never came"),
        (["b", "a"], "Expected the tensor 'a'.*got 'b'"),
        (["a", "a"], "Expected the tensor 'b'.*got 'a'"),
        (["a", "b", "a"], "Expected the tensor None.*got 'a'"),
    ],
)
def test_tensors_that_were_not_declared_so_are_refused_and_the_old_file_stays(tmp_path, given, message):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    declared = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match=message):
        write_streaming(path, declared, ((name, torch.zeros(2)) for name in given))
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2).double()])
def test_another_shape_or_dtype_than_declared_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="Expected the tensor 'a'"):
        write_streaming(tmp_path / "file", {"a": (torch.float32, (2,))}, [("a", wrong)])


def test_a_header_describes_what_safetensors_wrote(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    header = read_header(tmp_path / "file")
    assert header.metadata == {"format": "pt"} and header.tensors.keys() == tensors.keys()
    for name, where in header.tensors.items():
        assert same(read_tensor(tmp_path / "file", where), tensors[name]), name
    begins = [where.begin for where in header.tensors.values()]
    assert begins == sorted(begins)


def raw_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header larger than the file": raw_file({}, size=3),
    "header of a petabyte": raw_file({}, size=1 << 50),
    "header of 2^64 bytes": b"\xff" * 64,
    "zip archive": b"PK\x03\x04" + b"\0" * 64,
    "pickle": b"\x80\x02}q\x00." + b"\0" * 64,
    "not JSON": raw_file(b"{]"),
    "not UTF-8": raw_file(b'{"\xff": 1}'),
    "a list": raw_file([1, 2]),
    "deeply nested": raw_file(b"[" * 200_000),
    "no dtype": raw_file({"x": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "unknown dtype": raw_file({"x": entry(0, 4, dtype="F33")}, b"1234"),
    "object dtype": raw_file({"x": entry(0, 4, dtype=["F32"])}, b"1234"),
    "cut off": raw_file({"x": entry(0, 8, (2,))}, b"1234"),
    "more bytes than tensors": raw_file({"x": entry(0, 4)}, b"12345"),
    "outside": raw_file({"x": entry(4, 8)}, b"1234"),
    "negative": raw_file({"x": entry(-4, 0)}, b"1234"),
    "backwards": raw_file({"x": entry(4, 0)}, b"1234"),
    "negative shape": raw_file({"x": entry(0, 4, (-1, -1))}, b"1234"),
    "huge shape": raw_file({"x": entry(0, 4, (1 << 62, 1 << 62))}, b"1234"),
    "shape of another size": raw_file({"x": entry(0, 4, (2,))}, b"1234"),
    "fractions": raw_file({"x": entry(0, 4.0)}, b"1234"),
    "truth values": raw_file({"x": entry(False, 4)}, b"1234"),
    "three offsets": raw_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
    "overlap": raw_file({"x": entry(0, 4), "y": entry(2, 6)}, b"123456"),
    "same place": raw_file({"x": entry(0, 4), "y": entry(0, 4)}, b"1234"),
    "gap": raw_file({"x": entry(0, 4), "y": entry(8, 12)}, b"123456789012"),
    "one name twice": raw_file(b'{"x": %s, "x": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"12345678"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_files_that_are_not_whole_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file: .*Restore it"):
        read_header(tmp_path / "file")


def test_a_zip_archive_and_a_pickle_are_called_by_their_names(tmp_path):
    for content in (BROKEN["zip archive"], BROKEN["pickle"]):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match="zip archive or a pickle, which can run code"):
            read_header(tmp_path / "file")


def test_a_damaged_header_is_refused_or_still_in_bounds(tmp_path):
    path = tmp_path / "file"
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, path)
    whole = path.read_bytes()
    (header_size,) = struct.unpack("<Q", whole[:8])
    dice = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            damaged[dice.randrange(8 + header_size)] = dice.randrange(256)
        del damaged[dice.choice([len(damaged), dice.randrange(len(damaged))]) :]
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except UserError:
            refused += 1
            continue
        for where in header.tensors.values():
            assert 8 <= where.begin <= where.end <= len(damaged)
            assert read_tensor(path, where).shape == where.shape
    assert 300 < refused < 400


def test_overwriting_changes_those_bytes_and_no_other(tmp_path):
    path, tensors = tmp_path / "file", {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, path, metadata={"format": "pt"})
    before = path.read_bytes()
    new = torch.full((3, 5), 0.1)
    overwrite(path, {"odd": new})
    where = read_header(path).tensors["odd"]
    assert same(load_file(path)["odd"], new.bfloat16())
    after = path.read_bytes()
    assert after[: where.begin] == before[: where.begin] and after[where.end :] == before[where.end :]


@pytest.mark.parametrize("tensors", [{"odd": torch.zeros(5, 3)}, {"flags": torch.zeros(3), "missing": torch.zeros(1)}])
def test_overwriting_what_is_not_there_writes_nothing(tmp_path, tensors):
    path = tmp_path / "file"
    save_file({name: tensor.contiguous() for name, tensor in some_tensors().items()}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="Cannot overwrite"):
        overwrite(path, tensors)
    assert path.read_bytes() == before


def test_ranges_are_copied_to_their_place(tmp_path):
    data = random.Random(0).randbytes(3_000_001)  # several buffers
    (tmp_path / "source").write_bytes(data)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb") as target:
        allocate(target.fileno(), len(data))
        copy_range(source.fileno(), target.fileno(), 7, 2_999_990)
        copy_range(source.fileno(), target.fileno(), 5, 5)
    copied = (tmp_path / "target").read_bytes()
    assert copied == bytes(7) + data[7:2_999_990] + bytes(11)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "file"
    write_streaming(path, {"x": (torch.float32, (8,))}, [("x", torch.ones(8))])
    where = read_header(path).tensors["x"]
    os.truncate(path, where.end - 4)
    with pytest.raises(OSError, match="4 bytes early"):
        read_tensor(path, where)


def test_parts_of_a_tensor_are_read_and_written_alone(tmp_path):
    path = tmp_path / "file"
    write_streaming(path, {"x": (torch.int32, (4, 2))}, [("x", torch.arange(8, dtype=torch.int32).reshape(4, 2))])
    whole = read_header(path).tensors["x"]
    part = Stored(torch.int32, (2, 2), whole.begin + 8, whole.begin + 24)
    assert read_tensor(path, part).tolist() == [[2, 3], [4, 5]]
    with open(path, "r+b", buffering=0) as handle:
        write_at(handle.fileno(), torch.tensor([[8, 9]], dtype=torch.int32), part.begin)
    assert load_file(path)["x"].tolist() == [[0, 1], [8, 9], [4, 5], [6, 7]]


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 150_000_000))
    os.truncate(path, 200_000_000)  # sparse: it takes no room
    with pytest.raises(UserError, match="claims 150000000 bytes of a file of 200000000"):
        read_header(path)
