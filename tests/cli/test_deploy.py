"""agra serve and agra control: settings that cannot be meant end in one line, and a run without answers is no success."""

import json

import pytest

from agra.cli.main import main

SERVE = ("serve", "tabletop-agra")
TLS = ("--tls-certificate", "a.pem", "--tls-key", "b.pem", "--groot-port", "5555")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("agra: error: ")
    return said


@pytest.mark.parametrize("flag", ["--port", "--groot-port"])
@pytest.mark.parametrize("port", ["99999", "-1"])
def test_ports_have_a_range(capsys, flag, port):
    assert f"{flag} {port}: expected 0 to 65535" in refused(capsys, *SERVE, flag, port)


def test_groots_protocol_is_not_in_plaintext_beside_tls_by_accident(capsys, monkeypatch):
    monkeypatch.setenv("AGRA_API_KEY", "key")
    assert "GR00T's protocol has no TLS" in refused(capsys, *SERVE, "--host", "0.0.0.0", *TLS)
    assert "No such file" in refused(capsys, *SERVE, "--host", "0.0.0.0", *TLS, "--groot-allow-plaintext")
    assert "No such file" in refused(capsys, *SERVE, *TLS)  # this machine alone


def test_a_key_that_no_header_carries_alike_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("AGRA_API_KEY", "s\xe9same")
    assert "API key: expected printable ASCII" in refused(capsys, *SERVE)


def test_a_mixture_of_nothing_is_one_line(capsys, tmp_path):
    path = tmp_path / "mixture.json"
    for content in (None, {}, "x", 3):
        path.write_text(json.dumps(content))
        said = refused(capsys, "train", "tiny", "--output", str(tmp_path / "run"), "--mixture", str(path))
        assert "mixture.json: expected a JSON list of the datasets to mix" in said


def test_a_control_run_without_any_answer_fails(capsys):
    with pytest.raises(SystemExit) as stop:
        main(("control", "ws://127.0.0.1:1", "--seconds", "0.5"))
    assert stop.value.code == 1
    assert "no answer came" in capsys.readouterr().err
