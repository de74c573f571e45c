"""Decoding in a child: the same answers as in this process, whatever becomes of the child."""

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from acsr_ray.corpus.images import DecodeLimits, ImageError, decode_image, encode_png
from acsr_ray.corpus.isolated import DecoderSettings, DecoderStartError, IsolatedDecoder

CHILDREN = Path(__file__).parent / "children"
LIMITS = DecodeLimits(max_side=6000)
FAULTY = (sys.executable, "-P", str(CHILDREN / "faulty.py"))
GENERATOR = np.random.default_rng(1)
SMALL = [GENERATOR.integers(0, 256, (9, 7 + number, 3)).astype(np.uint8) for number in range(5)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = [encode_png(pixels) for pixels in SMALL]
NOISE = encode_png(GENERATOR.integers(0, 256, (1500, 1000, 3)).astype(np.uint8))
"""Longer than any pipe, and slow enough to be caught at work."""


@pytest.fixture
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder(LIMITS) as decoder:
        yield decoder


@pytest.fixture
def faults(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "faults"
    path.touch()
    monkeypatch.setenv("FAULTS", str(path))
    return path


@pytest.fixture
def faulty(faults) -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder(LIMITS, DecoderSettings(timeout_s=1), FAULTY) as decoder:
        yield decoder


def reason_of(decoder: IsolatedDecoder, data: bytes | None) -> str:
    with pytest.raises(ImageError) as error_info:
        decoder.decode(data)
    return error_info.value.reason


def outcomes(decoder: IsolatedDecoder, images: list[bytes | None]) -> list[object]:
    found = decoder.decode_all(images)
    return [image.reason if isinstance(image, ImageError) else image.tolist() for image in found]


def locally(data: bytes | None) -> object:
    try:
        return decode_image(data, LIMITS).tolist()
    except ImageError as refused:
        return refused.reason


MIXED = [
    GOOD[0],
    None,
    jpeg(SMALL[1]),
    b"",
    b"text",
    GOOD[1][:-30],
    GOOD[2],
    encode_png(np.zeros((1, 6001, 3), np.uint8)),
    jpeg(SMALL[3])[:-30] + b"\xff\xd9",
    GOOD[4],
]


def test_the_child_answers_as_this_process_does(decoder):
    expected = [locally(data) for data in MIXED]
    reasons = {found for found in expected if isinstance(found, str)}
    assert reasons == {"null_image", "empty", "unsupported_format", "decode_error", "too_large"}
    assert outcomes(decoder, MIXED) == expected
    for data, found in zip(MIXED, expected, strict=True):
        if isinstance(found, str):
            assert reason_of(decoder, data) == found
        else:
            assert decoder.decode(data).tolist() == found
    assert list(decoder.decode_all([])) == []


def test_many_images_in_one_go_keep_their_order(decoder):
    images = [GOOD[number % 5] for number in range(200)] + [NOISE, GOOD[0], NOISE]
    found = list(decoder.decode_all(images))
    assert [image.shape[1] for image in found[:200]] == [7 + number % 5 for number in range(200)]
    assert [image.shape[1] for image in found[200:]] == [1000, 7, 1000]
    assert np.array_equal(found[202], decode_image(NOISE, LIMITS))


def test_what_needs_no_decoder_starts_none():
    with IsolatedDecoder(DecodeLimits(max_megabytes=100 / 2**20)) as decoder:
        assert [reason_of(decoder, data) for data in (None, b"", NOISE)] == [
            "null_image",
            "empty",
            "too_large",
        ]
        assert decoder.pid is None


@pytest.mark.parametrize(("word", "reason"), [(b"CRASH", "decoder_crash"), (b"LARGE", "decoder_crash")])
def test_an_image_that_crashes_the_decoder(faulty, faults, word, reason):
    assert reason_of(faulty, word) == reason
    assert len(faults.read_text().split()) == 2
    assert np.array_equal(faulty.decode(GOOD[0]), SMALL[0])


@pytest.mark.parametrize("word", [b"SLEEP", b"SPINS"])
def test_an_image_that_hangs_the_decoder(faulty, faults, word):
    faulty.decode(GOOD[0])
    started = time.monotonic()
    assert reason_of(faulty, word) == "decoder_timeout"
    assert 2 <= time.monotonic() - started < 20
    assert len(faults.read_text().split()) == 2
    assert np.array_equal(faulty.decode(GOOD[0]), SMALL[0])


def test_only_the_culprit_among_many_is_refused(faulty, faults):
    images = [*GOOD, b"CRASH", *GOOD]
    expected = [
        *(pixels.tolist() for pixels in SMALL),
        "decoder_crash",
        *(pixels.tolist() for pixels in SMALL),
    ]
    assert outcomes(faulty, images) == expected
    # At most three children for one image.
    assert len(faults.read_text().split()) == 3


def test_answers_of_a_wrong_size_are_not_believed(faulty):
    assert reason_of(faulty, b"SHAPE") == "decoder_crash"
    assert np.array_equal(faulty.decode(GOOD[0]), SMALL[0])


def test_what_libraries_print_is_no_answer(faulty, faults):
    assert np.array_equal(faulty.decode(b"PRINT" + GOOD[0]), SMALL[0])
    assert faults.read_text().split() == ["PRINT"]


def test_a_child_killed_at_work_is_replaced(decoder):
    decoder.decode(GOOD[0])
    first = decoder.pid
    killer = threading.Timer(0.02, os.kill, (first, signal.SIGKILL))
    killer.start()
    # Long enough for the signal to come while they are decoded.
    found = list(decoder.decode_all([NOISE] * 6))
    killer.join()
    assert decoder.pid != first
    for image in found:
        assert np.array_equal(image, decode_image(NOISE, LIMITS))


def test_a_child_that_is_always_killed_at_work(decoder):
    decoder.decode(GOOD[0])
    done = threading.Event()

    def kill_every_child() -> None:
        while not done.is_set():
            if decoder.pid is not None:
                # Between reading the number and the signal the child may be gone already.
                for child in (child for child in psutil.Process().children() if child.pid == decoder.pid):
                    child.kill()
            time.sleep(0.001)

    killer = threading.Thread(target=kill_every_child)
    killer.start()
    try:
        with pytest.raises((ImageError, DecoderStartError)) as error_info:
            list(map(decoder.decode, [NOISE] * 20))
    finally:
        done.set()
        killer.join()
    assert getattr(error_info.value, "reason", "decoder_crash") == "decoder_crash"
    assert np.array_equal(decoder.decode(GOOD[1]), SMALL[1])


@pytest.mark.parametrize("data", [GOOD[0], NOISE], ids=["read", "write"])
def test_a_stopped_child_does_not_stop_its_parent(data):
    with IsolatedDecoder(LIMITS, DecoderSettings(timeout_s=3)) as decoder:
        decoder.decode(GOOD[1])
        first = decoder.pid
        child = psutil.Process(first)
        os.kill(first, signal.SIGSTOP)
        started = time.monotonic()
        assert np.array_equal(decoder.decode(data), decode_image(data, LIMITS))
        assert 3 <= time.monotonic() - started < 30
        assert decoder.pid != first
        assert not psutil.wait_procs([child], timeout=30)[1]


def test_a_child_that_died_between_images_costs_no_attempt(decoder):
    decoder.decode(GOOD[0])
    for _ in range(3):
        child = psutil.Process(decoder.pid)
        child.kill()
        time.sleep(0.05)
        assert np.array_equal(decoder.decode(GOOD[1]), SMALL[1])


@LINUX
@pytest.mark.parametrize(
    ("fmt", "options", "megabytes"),
    # Enough for the file of a BMP, and for a JPEG's pixels but not a progressive one's coefficients.
    [("PNG", {}, 12), ("BMP", {}, 44), ("JPEG", {}, 12), ("JPEG", {"progressive": True}, 30)],
    ids=str,
)
def test_memory_is_limited(fmt, options, megabytes):
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(buffer, fmt, **options)
    with IsolatedDecoder(LIMITS, DecoderSettings(memory_megabytes=megabytes)) as decoder:
        assert reason_of(decoder, buffer.getvalue()) == "decoder_memory"
        assert np.array_equal(decoder.decode(GOOD[0]), SMALL[0])


def test_children_are_recycled():
    with IsolatedDecoder(LIMITS, DecoderSettings(recycle_after=3)) as decoder:
        pids = []
        for _ in range(7):
            decoder.decode(GOOD[0])
            pids.append(decoder.pid)
    assert pids[0] == pids[2] != pids[3] == pids[5] != pids[6]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_child_ends_with_its_decoder():
    decoder = IsolatedDecoder(LIMITS)
    decoder.decode(GOOD[0])
    pid = decoder.pid
    decoder.close()
    assert decoder.pid is None
    assert not psutil.pid_exists(pid)
    assert np.array_equal(decoder.decode(GOOD[1]), SMALL[1])
    forgotten = decoder.pid
    del decoder
    gc.collect()
    assert not psutil.pid_exists(forgotten)


@LINUX
def test_the_child_dies_with_its_parent(faults):
    command = [sys.executable, str(CHILDREN / "parent.py"), FAULTY[-1]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        waited = time.monotonic() + 20
        while not faults.read_text() and time.monotonic() < waited:
            time.sleep(0.02)
        assert faults.read_text() == "SLEEP\n"
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


@LINUX
def test_the_child_is_restrained(decoder):
    decoder.decode(GOOD[0])
    process = Path("/proc") / str(decoder.pid)
    assert (process / "oom_score_adj").read_text().strip() == "1000"
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    assert int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1
    limits = (process / "limits").read_text()
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core")] == ["0"]
    (space,) = (int(line.split()[3]) for line in limits.splitlines() if line.startswith("Max address"))
    assert 2048 <= space / 2**20 < 2048 + 1000
    assert int(status["VmRSS"].split()[0]) < 100 * 1024


def test_the_child_is_light():
    code = (
        "import sys, acsr_ray.corpus.decoder_child\n"
        "bad = {'torch', 'ray', 'pyarrow', 'pandas', 'scipy', 'sklearn'} & sys.modules.keys()\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [("raise SystemExit('no library here')", "no library here"), ("print('?' * 99)", "another language")],
)
def test_a_child_that_does_not_start_blames_no_image(program, said):
    with pytest.raises(DecoderStartError, match=said):
        IsolatedDecoder(LIMITS, command=(sys.executable, "-c", program)).decode(GOOD[0])


def test_threads_take_turns(decoder):
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(decoder.decode(GOOD[number]), SMALL[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_image_does_not_answer_for_the_next(decoder):
    class Interruption(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    decoder.decode(GOOD[0])
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Interruption):
            list(map(decoder.decode, [NOISE] * 100))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.array_equal(decoder.decode(GOOD[2]), SMALL[2])


@pytest.mark.parametrize("cycles", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_is_left_of_replaced_children(decoder, cycles):
    decoder.decode(GOOD[0])
    this = psutil.Process()
    before = this.num_fds(), len(this.children())
    for number in range(cycles):
        os.kill(decoder.pid, signal.SIGKILL if number % 2 else signal.SIGABRT)
        assert np.array_equal(decoder.decode(GOOD[1]), SMALL[1])
    assert (this.num_fds(), len(this.children())) == before


def test_very_large_pictures_in_small_files_are_held_one_answer_at_a_time(encoded):
    """A request of small files may decode to gigabytes: the child postpones what is too much."""
    import numpy as np

    solid = [encoded(np.full((3000, 3000, 3), level, np.uint8)) for level in range(10)]
    assert sum(map(len, solid)) < 2**20
    with IsolatedDecoder(DecodeLimits()) as decoder:
        outcomes = decoder.decode_all(iter(solid))
        first = next(outcomes)
        asked = decoder._child.images
        levels = [int(first[0, 0, 0]), *(int(image[-1, -1, 0]) for image in outcomes)]
        assert levels == list(range(10))
        # 27 MB each: what was not answered at first was asked for again.
        assert decoder._child.images > asked
