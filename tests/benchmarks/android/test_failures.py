"""What goes wrong on the way to a phone: one clear message each, and what was measured is kept."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .adb_device import Phone
from .case import REMOTE, Case, started
from .conftest import TIMEOUT, adb, connect, wait_until


def test_no_room(phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    df = phone.path("df")
    df.write_text(df.read_text().replace("8000000", "200000"))
    assert case.run() == 1
    assert "205 MB free on the phone, expected" in capsys.readouterr().err  # 200,000 KiB
    assert not phone.received

    df.write_text(df.read_text().replace("200000", "8000000"))
    phone.space = 30_000  # less than df says
    assert case.run() == 1
    assert "no space left on the phone" in capsys.readouterr().err
    assert not phone.path(f"{REMOTE}/packages/my small model/memory.rom").exists()


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"ro__product__cpu__abi": "x86_64"}, "its ABI is x86_64, expected arm64-v8a"),
        ({"ro__build__version__sdk": "30"}, r"API level 30 \(Android 15\), expected 31"),
        ({"ro__soc__model": "SM8550"}, r"compiled for sm8750, expected sm8550 .*meki-compile .* --soc sm8550 --dense"),
        ({"ro__soc__model": ""}, "does not name its chip"),
        ({"ro__build__version__sdk": ""}, "getprop answered"),
    ],
)
def test_wrong_phone(
    phone: Phone, case: Case, properties: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    phone.set("getprop", **properties)
    assert case.run() == 1
    assert re.search(message, capsys.readouterr().err)
    assert not phone.received


def test_package_that_is_damaged_or_too_short(phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--depth", "508") == 2  # with 4 tokens and one that is pending 513
    assert "513 tokens, but" in capsys.readouterr().err
    (case.package / "qnn/sm8750/head.onnx").write_bytes(b"something else")
    assert case.run() == 1
    assert "head.onnx: SHA-256 is" in capsys.readouterr().err
    assert not phone.received


def test_which_phone(
    phones: Callable[[], Phone], case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert case.run(*arguments) == 1
        return capsys.readouterr().err

    assert "no phone" in error()
    first, second = phones(), phones()
    first.authorized = False
    adb("connect", first.serial)
    wait_until(lambda: "unauthorized" in adb("devices"), "unauthorized")
    assert "expected 'device': unlock it and answer \"Allow USB debugging?\"" in error()
    connect(second)
    assert "2 phones are connected" in error()
    assert "no such phone" in error("--serial", "nobody")
    monkeypatch.setenv("ANDROID_SERIAL", second.serial)
    assert case.run() == 0
    second.unplug()
    wait_until(lambda: f"{second.serial}\toffline" in adb("devices"), "offline")
    assert "is in state 'offline'" in error()
    assert "no such program; install" in error("--adb", "/nowhere/adb")


DEATHS = {
    "sys.stderr.write('meki_bench: error: no HTP\\n'); sys.exit(1)": r"exit status 1; .*\n  meki_bench: error: no HTP",
    "os.kill(os.getpid(), signal.SIGKILL)": r"killed \(signal 9\): most often Android",
    "os.kill(os.getpid(), signal.SIGSEGV)": "ended by signal 11",
    "open(options['--json'], 'w').write('{'); sys.exit(0)": r"its JSON cannot be read",
    "report['memory'] = 'other'": "memory is 'other' in its JSON, expected 'meki'",
    "report['decode_tokens_per_s'][0] = float('nan')": "decode_tokens_per_s is .* expected 3 speeds",
    "report['depth'] += 1": "runs at depths 479 and 480 cannot be compared",
    "sys.exit(0)": "`cat .*run.json` ended with exit status 1:\n  .*No such file",
}


@pytest.mark.parametrize("death", DEATHS)
def test_run_that_fails(phone: Phone, case: Case, death: str, capsys: pytest.CaptureFixture[str]) -> None:
    case.hook(f"if call == 2: {death}")
    case.install(phone)
    assert case.run() == 1
    captured = capsys.readouterr()
    assert re.search(DEATHS[death], captured.err, re.DOTALL)
    report = case.report()  # of what was measured before
    assert [run["variant"]["memory"] for run in report["runs"]] == ["dense"]
    assert report["failure"] in captured.err
    assert any(label.startswith("not complete") for label in report["labels"])
    assert "| dense |" in captured.out


def test_first_run_that_fails_keeps_the_figures_of_an_earlier_call(
    phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.hook("sys.exit(1)")
    case.install(phone)
    case.json.write_text("earlier figures")
    assert case.run() == 1
    captured = capsys.readouterr()
    assert "exit status 1" in captured.err and "runs before that" not in captured.err
    assert captured.out == ""
    assert case.json.read_text() == "earlier figures"


def test_unplugged_during_a_run(phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.hook("if call == 2: open('there', 'w').close(); time.sleep(600)")
    case.install(phone)
    with started(case) as process:
        wait_until(phone.path(f"{REMOTE}/bin/there").exists, "the second run")
        phone.unplug()
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "lost during a command" in error
    assert len(case.report()["runs"]) == 1
    pid = int(phone.path(f"{REMOTE}/bin/run.pid").read_text())
    os.kill(pid, 0)  # it goes on, as on a phone

    phone.plug()
    connect(phone)
    case.hook("")
    case.install(phone)
    assert case.run() == 0  # what was left behind is ended before measuring
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), "killed")


def test_interrupt(phone: Phone, case: Case) -> None:
    case.hook("if call == 2: open('there', 'w').close(); time.sleep(600)")
    case.install(phone)
    with started(case) as process:
        wait_until(phone.path(f"{REMOTE}/bin/there").exists, "the second run")
        pid = int(phone.path(f"{REMOTE}/bin/run.pid").read_text())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert case.report()["failure"] == "interrupted"
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "meki_bench ends")
    assert not phone.path(f"{REMOTE}/bin/run.pid").exists()
