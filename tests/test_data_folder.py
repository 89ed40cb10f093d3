"""Images of one's own: what is read, how it is decoded, kept and split, and who learns of it."""

import io
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import newest

from ER_DST import main as dst
from startsparse import data, export, runs
from startsparse.data import decoded, files, folder
from startsparse.errors import OptionError, UserError
from startsparse.export import command
from STR import main as st

CPU = torch.device("cpu")
SIZE = 16
LOAD = {"batch_size": 8, "valid_split": 0.25, "seed": 1, "device": CPU}


def picture(path, seed, size=(SIZE, SIZE), mode="RGB", **more):
    """An image of noise, written as its suffix says; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)
    return pixels


def images(root, parts=("train", "test"), each=8, classes=("cat", "dog")):
    """PNG images in ``root/part/class``; returns their pixels in the order of their paths."""
    pixels = {}
    for number, (part, name) in enumerate((p, c) for p in parts for c in classes):
        for i in range(each):
            path = root / part / name / f"{i:02}.png"
            pixels[f"{part}/{name}/{i:02}.png"] = picture(path, 100 * number + i)
    return pixels


def load(root, **more):
    return data.load("folder", root=root, **{**LOAD, **more})


def whole(batches):
    """All inputs and labels of an epoch."""
    inputs, labels = zip(*batches.epoch(0))
    return torch.cat(inputs), torch.cat(labels)


# --- what is read ---------------------------------------------------------------------------------


def test_every_image_with_its_label_in_the_order_of_names(tmp_path):
    pixels = images(tmp_path)
    for path in ("test/dog/.DS_Store", "test/.cache/x.png", "test/dog/.hidden.png", ".git/x"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("nothing")
    found = load(tmp_path)
    assert found.images.class_names == ("cat", "dog")
    assert found.shape == data.Shape(2, 3, SIZE)
    inputs, labels = whole(found.test)
    assert labels.tolist() == [0] * 8 + [1] * 8
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.images.mean, found.images.std))
    back = ((inputs * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
    expected = [value for name, value in pixels.items() if name.startswith("test")]
    assert torch.equal(back, torch.from_numpy(np.stack(expected)))


def test_mean_and_std_are_those_of_the_images_trained_on(tmp_path):
    pixels = images(tmp_path, parts=("train",), each=10)
    found = load(tmp_path)
    rows = data._split(20, 0.25, 1, ("valid", "test"))
    assert {name: len(part) for name, part in rows.items()} == {"train": 10, "valid": 5, "test": 5}
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(20))
    trained = np.stack(list(pixels.values()))[rows["train"]] / 255
    assert found.images.mean == pytest.approx(trained.mean((0, 1, 2)), abs=1e-9)
    assert found.images.std == pytest.approx(trained.std((0, 1, 2)), abs=1e-9)
    assert [part.examples for part in (found.train, found.valid, found.test)] == [10, 5, 5]


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train",), (8, 4, 4)),
        (("train", "val"), (12, 16, 4)),
        (("train", "test"), (12, 4, 16)),
        (("train", "val", "test"), (16, 16, 16)),
    ],
)
def test_parts_that_are_missing_are_held_out_of_train(tmp_path, parts, sizes):
    images(tmp_path, parts)
    found = load(tmp_path)
    assert (found.train.examples, found.valid.examples, found.test.examples) == sizes
    own = {"val": found.valid, "test": found.test}
    for name in set(parts) - {"train"}:
        assert whole(own[name])[1].tolist() == [0] * 8 + [1] * 8
    assert torch.equal(load(tmp_path).test.labels, found.test.labels)


def test_a_share_of_nothing_has_no_effect(tmp_path):
    images(tmp_path, ("train", "val", "test"))
    with pytest.raises(OptionError, match=r"--valid-split: has no effect with --set folder, which"):
        st.main(["--set", "folder", "--data", str(tmp_path), "--valid-split", "0.2"])


def test_two_parts_held_out_need_a_share(tmp_path):
    images(tmp_path, ("train", "val"))
    with pytest.raises(UserError, match="--valid-split: 0.0 of 16 examples is not one"):
        load(tmp_path, valid_split=0.0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda root: shutil.rmtree(root / "train"), "has no folder train"),
        (lambda root: shutil.rmtree(root / "train/dog"), "has 1 folder"),
        (lambda root: (root / "test/bird").mkdir(), "test/bird is a class that train lacks"),
        (lambda root: (root / "validation").mkdir(), "validation is not read"),
        (lambda root: [p.unlink() for p in (root / "train/cat").iterdir()], "train/cat has no"),
        (lambda root: shutil.rmtree(root / "test/cat") or shutil.rmtree(root / "test/dog"), "test"),
        (lambda root: picture(root / "train/cat/00.png", 1, (20, 16)), "--image-size: .*20 x 16"),
        (
            lambda root: (root / "train/cat/up").symlink_to(root / "train/cat"),
            "train/cat/up is a link to a folder that contains it",
        ),
        (lambda root: (root / "train/cat/up").symlink_to(".."), "train/cat/up/cat is a link"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path, monkeypatch, capsys, wrong, named):
    """One line, exit code 2, before any image is read."""
    images(tmp_path)
    wrong(tmp_path)
    monkeypatch.setattr(folder, "decoded", lambda *_: pytest.fail("images were read"))
    with pytest.raises(OptionError, match=named) as error:
        st.main(["--set", "folder", "--data", str(tmp_path), "--log-dir", str(tmp_path / "runs")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_the_folder_has_to_be_named():
    with pytest.raises(OptionError, match=r"--data: --set folder needs"):
        st.main(["--set", "folder"])


def test_files_that_are_no_images_are_named(tmp_path, caplog):
    images(tmp_path)
    (tmp_path / "train/cat/readme.txt").write_text("hello")
    with caplog.at_level("WARNING", logger="startsparse"):
        folder.log.propagate = True
        try:
            assert load(tmp_path).train.examples == 12
        finally:
            folder.log.propagate = False
    assert "train/cat/readme.txt" in caplog.text


def test_damaged_images_are_named_together(tmp_path):
    images(tmp_path)
    for name in ("train/cat/03.png", "train/dog/01.png", "test/dog/00.png", "test/dog/01.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(UserError) as error:
        load(tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert all(name in line for name in ("cat/03.png", "train/dog/01.png", "test/dog/00.png"))
    assert "and 1 more" in line
    assert not list((tmp_path / decoded.STORE).glob("*.npy"))


def test_what_is_no_file_is_named(tmp_path):
    """A pipe would be waited for for ever."""
    images(tmp_path)
    (tmp_path / "train/cat/00.png").unlink()
    os.mkfifo(tmp_path / "train/cat/00.png")
    for size in (0, SIZE):  # where the first image says the size, and where all are read
        with pytest.raises(UserError, match=r"cat/00.png: cannot .* \(is a pipe or a device, not"):
            load(tmp_path, image_size=size)
    (tmp_path / "train/cat/00.png").unlink()
    (tmp_path / "train/cat/00.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"cat/00.png: cannot be read \(No such file"):
        load(tmp_path, image_size=SIZE)


def test_names_of_any_bytes(tmp_path):
    classes = ("a\nb", "c,d", "é", os.fsdecode(b"caf\xe9"), " ", "--x")
    images(tmp_path, ("train",), each=2, classes=classes)
    (tmp_path / "train" / classes[3] / "other.txt").touch()
    found = folder.load(tmp_path)
    assert found.class_names == tuple(sorted(classes))
    assert found.train[1].tolist() == [i // 2 for i in range(12)]
    assert folder.load(tmp_path).content == found.content
    kept = data.Images(found.class_names, (0.5,), (0.5,), SIZE, 3)
    assert data.Images.from_json(kept.to_json()) == kept


# --- how an image is decoded ----------------------------------------------------------------------


def test_sixteen_bits_keep_their_shades(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for mode in ("L", "RGB"):
        found = np.asarray(files.open_image(tmp_path / "ramp.png", mode)).reshape(65536, -1)
        assert np.abs(found[:, 0] - ramp.flatten() / 257).max() <= 0.5
        assert (found == found[:, :1]).all()


def test_palettes_transparency_and_turned_photos(tmp_path):
    colours = picture(tmp_path / "x.png", 1, mode="P")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P"
        table = np.asarray(image.getpalette()).reshape(-1, 3)
        expected = table[np.asarray(image)]
    assert (np.asarray(files.open_image(tmp_path / "x.png")) == expected).all()
    assert np.abs(expected.astype(int) - colours).mean() < 40

    clear = np.zeros((4, 4, 4), np.uint8)
    clear[0] = 200, 10, 10, 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = np.asarray(files.open_image(tmp_path / "clear.png"))
    assert (found[0] == (200, 10, 10)).all()
    assert (found[1:] == 255).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    photo = picture(tmp_path / "photo.png", 2, (8, 4), exif=exif)
    turned = np.asarray(files.open_image(tmp_path / "photo.png", upright=True))
    assert (turned == np.rot90(photo, -1)).all()


def chunk(kind, content):
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def png(values, colour, *more, bits=16, size=None):
    """A PNG of values [H, W, ...] and of a type of colour, which PIL cannot write."""
    height, width = size or values.shape[:2]
    rows = values.astype(">u2" if bits == 16 else ">u1").reshape(len(values), -1)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", head), *more, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def opened(path, content, mode="RGB"):
    path.write_bytes(content)
    return np.asarray(files.open_image(path, mode)).astype(int)


def test_sixteen_bits_of_every_kind(tmp_path):
    """Colours lose what PIL cuts off: at most one shade of 256."""
    ramp = np.arange(65536).reshape(256, 256)
    colours, path = np.stack([ramp, ramp[::-1], ramp.T], 2), tmp_path / "x.png"
    solid = np.full((256, 256, 1), 65535)
    eight = colours / 257
    assert np.abs(opened(path, png(colours, 2)) - eight).max() <= 1
    assert np.abs(opened(path, png(np.concatenate([colours, solid], 2), 6)) - eight).max() <= 1
    grey = np.concatenate([ramp[..., None], solid], 2)
    assert np.abs(opened(path, png(grey, 4), "L") - ramp / 257).max() <= 1
    half = np.concatenate([colours, solid // 2], 2)
    assert np.abs(opened(path, png(half, 6)) - (eight + 255) / 2).max() <= 2
    found = opened(path, png(ramp, 0, (b"tRNS", b"\0\x80")), "L")
    assert found.reshape(-1)[128] == 255  # the transparent shade
    assert np.abs(found - ramp / 257).reshape(-1)[np.arange(65536) != 128].max() <= 0.5


def test_one_bit_and_four_colours(tmp_path):
    Image.fromarray(np.eye(4) > 0).save(tmp_path / "bits.png")
    assert (np.asarray(files.open_image(tmp_path / "bits.png", "L")) == 255 * np.eye(4)).all()
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.jpg")
    assert (np.asarray(files.open_image(tmp_path / "x.jpg")) == (0, 255, 255)).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_picture_counts(tmp_path, suffix):
    red, blue = (Image.new("RGB", (4, 4), name) for name in ("red", "blue"))
    more = {"lossless": True} if suffix == "webp" else {}
    red.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[blue], **more)
    assert (np.asarray(files.open_image(tmp_path / f"x.{suffix}")) == (255, 0, 0)).all()


FRACTIONS = io.BytesIO()
Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(FRACTIONS, "TIFF")
WIDE = io.BytesIO()
Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(WIDE, "TIFF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "cannot identify image file"),
        (b"hello\n", "cannot identify image file"),
        (EPS, "cannot identify image file"),  # PIL would let Ghostscript run it
        (FRACTIONS.getvalue(), "its pixels are fractions"),
        (WIDE.getvalue(), "its pixels have more than 16 bits"),
        (png(np.zeros((1, 1)), 0, bits=8, size=(30_000, 30_000)), "decompression bomb"),
        (
            png(np.zeros((4, 4)), 0, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))),
            "too large",
        ),
        (png(np.random.default_rng(1).integers(0, 65536, (9, 9)), 0)[:-40], "truncated"),
    ],
    ids=["empty", "text", "EPS", "fractions", "32 bits", "bomb", "bomb of text", "cut"],
)
def test_odd_images_are_named(tmp_path, content, what):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=what) as error:
        files.open_image(tmp_path / "x.png")
    assert str(error.value).startswith(f"{tmp_path / 'x.png'}: cannot be decoded as an image (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".bmp", ".webp"])
def test_formats(tmp_path, suffix):
    images(tmp_path, parts=("train",))
    pixels = picture(tmp_path / f"train/dog/99{suffix}", 5)
    found = folder.load(tmp_path).train[0][-1].numpy()
    lossless = suffix in (".png", ".bmp")
    assert np.abs(found.astype(int) - pixels).mean() <= (0 if lossless else 60)


def test_sizes_are_brought_to_one(tmp_path):
    """The shorter side is resized, and the middle cut out; grey is 0.299 R + 0.587 G + 0.114 B."""
    images(tmp_path, parts=("train",))
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 180, 90, 30  # the middle
    Image.fromarray(wide).save(tmp_path / "train/dog/99.png")
    with pytest.raises(UserError, match=r"99.png: 60 x 20 pixels, not 16 x 16; .* --image-size"):
        folder.load(tmp_path)
    found = folder.load(tmp_path, image_size=10)
    assert found.size == 10
    assert (found.train[0][-1, :, 1:-1] == torch.tensor([180, 90, 30])).all()
    grey = folder.load(tmp_path, image_size=10, channels=1)
    assert grey.train[0].shape[1:] == (10, 10, 1)
    assert grey.train[0][-1, :, 1:-1].unique().tolist() == [
        round(0.299 * 180 + 0.587 * 90 + 0.114 * 30)
    ]


# --- the cache ------------------------------------------------------------------------------------


def decodings(monkeypatch):
    """A list that gets every path that is decoded."""
    seen, one = [], decoded._image
    monkeypatch.setattr(decoded, "_image", lambda *a: seen.append(a[-1]) or one(*a))
    return seen


def test_images_are_decoded_once_for_their_content(tmp_path, monkeypatch):
    root = tmp_path / "a"
    images(root)
    first = load(root)
    seen = decodings(monkeypatch)
    read = []
    monkeypatch.setattr(decoded, "_bytes", lambda path: read.append(path) or path.read_bytes())
    assert load(root).images == first.images
    assert (seen, read) == ([], [])

    shutil.copytree(root, tmp_path / "b")  # times are new, content is not
    for path in (tmp_path / "b").rglob("*.png"):
        path.touch()
    assert load(tmp_path / "b").images == first.images
    assert seen == []
    assert len(read) == 32

    picture(root / "train/cat/00.png", 77)
    assert load(root).images.content != first.images.content
    assert len(seen) == 32


@pytest.mark.parametrize("what", ["*.npy", "*.npz", "listed-*"])
@pytest.mark.parametrize("damage", ["cut", "empty", "one bit"])
def test_a_damaged_cache_is_made_again(tmp_path, what, damage):
    images(tmp_path)
    first = load(tmp_path)
    (path,) = (tmp_path / decoded.STORE).glob(what)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes({"cut": content[:-20], "empty": b"", "one bit": content}[damage])
    again = load(tmp_path)
    assert torch.equal(whole(again.test)[0], whole(first.test)[0])
    assert again.images == first.images


def test_what_a_killed_process_left_is_removed(tmp_path):
    images(tmp_path)
    store = tmp_path / decoded.STORE
    store.mkdir()
    for name in (".x-16-3.npy-0123abcd", ".x-16-3-sums.npz-0123abcd"):
        (store / name).write_bytes(b"half")
    load(tmp_path)
    assert sorted(path.suffix for path in store.iterdir()) == ["", ".json", ".npy", ".npz"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    images(tmp_path)

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(decoded.FileLock, "acquire", none)
    assert load(tmp_path).train.examples == 12


def test_a_store_that_loses_what_is_written_only_costs_time(tmp_path, monkeypatch):
    images(tmp_path)
    monkeypatch.setattr(decoded, "_kept", lambda *_: None)
    assert load(tmp_path).train.examples == 12


def test_the_cache_folder_serves_where_nothing_can_be_written(tmp_path, monkeypatch):
    root = tmp_path / "data"
    images(root)
    (root / decoded.STORE).write_text("in the way of the folder")
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path / "cache"))
    load(root)
    assert list((tmp_path / "cache/images").glob("*.npy"))
    monkeypatch.setattr(decoded, "_store", lambda _: None)
    assert whole(load(root).test)[0].shape == (16, 3, SIZE, SIZE)


def test_a_full_disk_only_costs_time(tmp_path, monkeypatch, capsys):
    images(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded.npy, "write_array_header_2_0", full)
    assert load(tmp_path).train.examples == 12
    assert "not kept (No space left on device)" in capsys.readouterr().err
    assert not list((tmp_path / decoded.STORE).glob("*.npy"))


# --- sets above the limit of memory ---------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_streamed_batches_are_those_of_resident_ones(tmp_path, padding):
    images(tmp_path)
    held, streamed = (load(tmp_path, memory=m, padding=padding, batch_size=5) for m in (0, 1e-9))
    assert type(streamed.train).__name__ == "Streamed"
    for name in ("train", "valid", "test"):
        one, other = getattr(held, name), getattr(streamed, name)
        assert len(one) == len(other)
        for epoch, start in ((0, 0), (3, 1)):
            for (x, y), (u, v) in zip(one.epoch(epoch, start), other.epoch(epoch, start)):
                assert torch.equal(x, u)
                assert torch.equal(y, v)
                assert u.stride() == x.stride()


# --- who learns of it -----------------------------------------------------------------------------


def argv(root, where, *more):
    script = ("--arch", "mlp", "--width", "8", "--epochs", "1", "--batch-size", "4")
    where = ("--log-dir", str(where / "runs"), "--result-dir", str(where))
    return ["--set", "folder", "--data", str(root), *script, *where, *more]


@pytest.mark.parametrize("script", [st, dst])
def test_classes_and_normalisation_are_in_run_checkpoint_and_export(tmp_path, script):
    root = tmp_path / "data"
    images(root)
    script.main(
        argv(root, tmp_path, "--image-size", "8", "--channels", "1", "--warmup-length", "0")
    )
    run = newest(tmp_path)
    kept = runs.images(run)
    assert (kept.class_names, kept.size, kept.channels) == (("cat", "dog"), 8, 1)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert data.Images.from_json(state["images"]) == kept
    assert json.loads((run / "summary.json").read_text())["images"] == kept.content
    command.main([str(run), "--repeats", "0"])
    network = export.load(run / "export/network.safetensors")
    assert network.images == kept
    inputs, labels = whole(load(root, image_size=8, channels=1, valid_split=0.1).test)
    accuracy = (network(inputs).argmax(1) == labels).double().mean().item()
    assert accuracy == json.loads((run / "summary.json").read_text())["test_accuracy"]


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    root = tmp_path / "data"
    images(root)
    st.main(argv(root, tmp_path))
    run = newest(tmp_path)
    (run / "summary.json").unlink()
    st.main(argv(root, tmp_path, "--resume", str(run)))
    (run / "summary.json").unlink()
    picture(root / "train/cat/00.png", 77)
    with pytest.raises(UserError, match="was trained on other images"):
        st.main(argv(root, tmp_path, "--resume", str(run)))


def test_flip_is_all_that_flip_changes(tmp_path):
    """With the same crops: a batch without flips has the images of one with them, not mirrored."""
    images(tmp_path)
    (plain, _), (mirrored, _) = (
        next(load(tmp_path, flip=flip).train.epoch(0)) for flip in (False, True)
    )
    same = [torch.equal(a, b) for a, b in zip(plain, mirrored)]
    assert 0 < sum(same) < len(same)
    assert all(s or torch.equal(a, b.flip(2)) for s, a, b in zip(same, plain, mirrored))
