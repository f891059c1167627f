"""`agra serve` and `agra control`: invalid settings end in one line, and a run without answers fails."""

import json
from pathlib import Path

import pytest

from agra.cli.main import main
from agra.serving.protocol.messages import WireKeys
from agra.serving.server.config import GrootWire, Limits, ServeConfig, Tls

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


def test_every_flag_of_serve_reaches_its_field(monkeypatch):
    served = []

    async def record(config, source, *, api_key):
        served.append((config, source.load, api_key))

    monkeypatch.setattr("agra.serving.server.app.serve", record)
    monkeypatch.setenv("AGRA_API_KEY", "key")
    flags = """--host 0.0.0.0 --port 1 --groot-port 2 --groot-camera front --groot-version n1.5 --embodiment arm
        --allow-unauthenticated --image-key i --state-keys a b --prompt-key p --max-batch 3 --max-connections 4
        --reload-interval 5 --tls-certificate c.pem --tls-key k.pem --groot-allow-plaintext --input-stretch 6 --no-fast
        --pool-future 2 --imagine --known-instructions --ready-file r.json --device meta"""
    main([*SERVE, *flags.split()])
    ((config, load, api_key),) = served
    assert config == ServeConfig(
        host="0.0.0.0",
        port=1,
        allow_unauthenticated=True,
        image_key="i",
        state_keys=("a", "b"),
        prompt_key="p",
        reload_interval=5.0,
        ready_file=Path("r.json"),
        tls=Tls(certificate=Path("c.pem"), key=Path("k.pem")),
        groot=GrootWire(port=2, camera="front", version="n1.5", embodiment="arm", allow_plaintext=True),
        limits=Limits(max_batch=3, max_connections=4, input_stretch=6.0),
    )
    assert config.keys == WireKeys(image="i", state=("a", "b"), prompt="p")
    assert api_key == "key"
    assert load.keywords == {
        "device": "meta", "fast": False, "compiled": False, "pool_future": 2, "imagines": True, "known_instructions": True,
            "action_noise": None, "video_noise": None,
    }  # fmt: skip


def test_invalid_limits_and_a_single_tls_file_are_one_line(capsys):
    assert "max_batch: expected a positive number, got 0" in refused(capsys, *SERVE, "--max-batch", "0")
    assert "expected both or none" in refused(capsys, *SERVE, "--tls-key", "k.pem")


def test_a_network_address_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("AGRA_API_KEY", raising=False)
    assert "set AGRA_API_KEY, or use --allow-unauthenticated" in refused(capsys, *SERVE, "--host", "0.0.0.0")


@pytest.mark.parametrize("flag", ["--port", "--groot-port"])
@pytest.mark.parametrize("port", ["99999", "-1"])
def test_ports_have_a_range(capsys, flag, port):
    assert f"{flag} {port}: expected 0 to 65535" in refused(capsys, *SERVE, flag, port)


def test_groots_plaintext_protocol_beside_tls_needs_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("AGRA_API_KEY", "key")
    assert "GR00T's protocol has no TLS" in refused(capsys, *SERVE, "--host", "0.0.0.0", *TLS)
    assert "No such file" in refused(capsys, *SERVE, "--host", "0.0.0.0", *TLS, "--groot-allow-plaintext")
    assert "No such file" in refused(capsys, *SERVE, *TLS)  # a loopback server needs no flag


def test_a_key_outside_ascii_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("AGRA_API_KEY", "s\xe9same")
    loaded = []
    monkeypatch.setattr("agra.policies.load.load_policy", lambda *args, **options: loaded.append(args))
    assert "API key: expected printable ASCII" in refused(capsys, *SERVE)
    assert not loaded


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
    assert "no answer in 0.5 s" in capsys.readouterr().err
