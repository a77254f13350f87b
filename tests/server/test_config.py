"""Flags over environment over a file over defaults, and every mistake named."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from vqserve_server import config

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def parse(*arguments: str, **environ: str) -> config.ServeConfig:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.resolve(vars(parser.parse_args(arguments)), environ)


def test_defaults() -> None:
    assert parse() == config.ServeConfig()
    assert parse().rpc.host == "127.0.0.1"
    assert parse().rpc.max_message_bytes == 64 << 20


@pytest.mark.parametrize("name", ["VQSERVE_X", "VQSERVE_PASSWORD", "VQSERVE_SECRET"])
def test_a_name_that_is_not_near_is_not_suggested(name: str) -> None:
    with pytest.raises(config.ConfigError, match=f"^unknown environment variable {name}$"):
        parse(**{name: "1"})


def test_flags_win_over_environment_over_defaults() -> None:
    settings = parse("--port", "1", "--drain-seconds", "2.5", VQSERVE_PORT="2", VQSERVE_MAX_BATCH_ROWS="3", HOME="/")
    assert (settings.rpc.port, settings.drain_seconds, settings.engine.max_batch_rows) == (1, 2.5, 3)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("VQSERVE_PRT", "1", "unknown environment variable VQSERVE_PRT: did you mean VQSERVE_PORT?"),
        (
            "VQSERVE_MAX_BATCH_ROW",
            "1",
            "unknown environment variable VQSERVE_MAX_BATCH_ROW: did you mean VQSERVE_MAX_",
        ),
        ("VQSERVE_PORT", "65536", "VQSERVE_PORT must be an integer from 0 to 65535, not '65536'"),
        ("VQSERVE_PORT", "٣", "VQSERVE_PORT must be an integer"),
        ("VQSERVE_MAX_BATCH_ROWS", "0", "VQSERVE_MAX_BATCH_ROWS must be an integer from 1"),
        ("VQSERVE_MAX_MESSAGE_BYTES", "-1", "VQSERVE_MAX_MESSAGE_BYTES must be an integer from 4096"),
        ("VQSERVE_DRAIN_SECONDS", "nan", "VQSERVE_DRAIN_SECONDS must be a number of seconds from 0 to 86400"),
        ("VQSERVE_DRAIN_SECONDS", "soon", "VQSERVE_DRAIN_SECONDS must be a number of seconds"),
        ("VQSERVE_WATCHDOG_SECONDS", "2", "VQSERVE_WATCHDOG_SECONDS must be 0 or from 3 to 86400 seconds, not '2'"),
        ("VQSERVE_RESCAN_SECONDS", "0.5", "VQSERVE_RESCAN_SECONDS must be 0 or from 1 to 86400 seconds, not '0.5'"),
        ("VQSERVE_DEVICE", "tpu", "VQSERVE_DEVICE must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("VQSERVE_LOG_LEVEL", "loud", "VQSERVE_LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
        ("VQSERVE_HOST", "", "VQSERVE_HOST must not be empty"),
        ("VQSERVE_MAX_QUEUE_BYTES", "4096", "--max-queue-bytes (4096) must hold a request and its reply"),
    ],
)
def test_a_mistake_in_the_environment_is_named(name: str, value: str, problem: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        parse(**{name: value})
    assert problem in str(caught.value)


def test_the_clients_variables_are_ignored() -> None:
    assert parse(VQSERVE_TARGET="host:1", VQSERVE_CODEBOOK="demo") == config.ServeConfig()


def test_a_client_s_certificate_is_not_the_server_s() -> None:
    mine = {
        f"VQSERVE_{name}": "x" for name in ("TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "TOKEN", "TOKEN_FILE")
    }
    assert parse(**mine) == config.ServeConfig()
    access = parse(VQSERVE_SERVER_TLS_CERT="server.crt", VQSERVE_SERVER_TLS_KEY="server.key").access
    assert (access.tls_cert, access.tls_key, access.is_encrypted) == ("server.crt", "server.key", True)


@pytest.mark.parametrize(("text", "value"), [("on", True), ("1", True), ("TRUE", True), ("off", False), ("0", False)])
def test_a_switch(text: str, value: bool) -> None:
    assert parse(VQSERVE_INSECURE=text).access.insecure is value
    assert parse("--insecure", VQSERVE_INSECURE=text).access.insecure
    with pytest.raises(config.ConfigError, match="VQSERVE_INSECURE must be on or off, not 'maybe'"):
        parse(VQSERVE_INSECURE="maybe")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--tls-cert", "a"), "--tls-cert and --tls-key need each other"),
        (("--tls-key", "a"), "--tls-cert and --tls-key need each other"),
        (("--tls-client-ca", "a"), "--tls-client-ca needs --tls-cert and --tls-key"),
        (("--health-port", "50051"), "--health-port must differ from --port, both are 50051"),
        (("--metrics-port", "50051"), "--metrics-port must differ from --port, both are 50051"),
        (("--metrics-port", "1", "--health-port", "1"), "--metrics-port must differ from --health-port, both are 1"),
    ],
)
def test_settings_that_contradict_each_other(flags: tuple[str, ...], problem: str) -> None:
    with pytest.raises(config.ConfigError, match=problem):
        parse(*flags)


def test_a_worker_gets_the_same_settings() -> None:
    settings = parse(
        *("--insecure", "--tls-cert", "a", "--tls-key", "b", "--tls-client-ca", "c", "--tokens", "d"),
        *("--health-port", "1", "--drain-seconds", "0.1", "--metrics-host", "::", "--metrics-port", "9"),
    )
    assert parse(**config.environment(settings)) == settings


def test_the_metrics_port_has_a_default_that_another_server_may_have() -> None:
    assert (parse().metrics.port, parse().metrics.is_port_required) == (9464, False)
    asked = parse("--metrics-port", "9464").metrics
    assert (asked.port, asked.is_port_required) == (9464, True)
    assert parse(VQSERVE_METRICS_PORT="0").metrics.port == 0
    # The default gives way.
    assert parse("--port", "9464").metrics.port == 9464


def test_a_mistake_in_a_flag_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--port", "x")
    assert caught.value.code == 2
    assert "--port: must be an integer from 0 to 65535, not 'x'" in capsys.readouterr().err


def test_the_documented_table_is_the_settings() -> None:
    # To mend it: python -c "from vqserve_server.config import settings_table; print(settings_table())"
    assert config.settings_table() in DOCS.read_text(encoding="utf-8")


def in_file(folder: Path, text: str, *flags: str, **environ: str) -> config.Resolved:
    """What a file says, beside flags and variables."""
    path = folder / "vqserve.toml"
    path.write_text(text)
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", nargs="*")
    config.add_flags(parser)
    return config.load(vars(parser.parse_args([*flags, "--config", str(path)])), environ)


def test_flags_win_over_environment_over_the_file(tmp_path: Path) -> None:
    text = "port = 3\ndrain_seconds = 3\nmax_batch_rows = 3\nlog_level = 'debug'\ninsecure = true\n"
    found = in_file(tmp_path, text, "--port", "1", VQSERVE_PORT="2", VQSERVE_DRAIN_SECONDS="2")
    settings = found.config
    assert (settings.rpc.port, settings.drain_seconds, settings.engine.max_batch_rows) == (1, 2.0, 3)
    assert (settings.log_level, settings.access.insecure, settings.workers) == ("debug", True, 1)
    path = str(tmp_path / "vqserve.toml")
    assert found.origins == {
        "port": "--port",
        "drain_seconds": "VQSERVE_DRAIN_SECONDS",
        "max_batch_rows": path,
        "log_level": path,
        "insecure": path,
    }


def test_a_variable_names_the_file_and_a_flag_another(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("port = 1")
    (tmp_path / "b.toml").write_text("port = 2")
    environ = {"VQSERVE_CONFIG": str(tmp_path / "a.toml")}
    assert config.resolve({}, environ).rpc.port == 1
    assert config.resolve({"config": str(tmp_path / "b.toml")}, environ).rpc.port == 2


def test_codebooks_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    text = 'codebooks = ["books", "faces=one.safetensors", "/abs"]'
    expected = (str(tmp_path / "books"), f"faces={tmp_path / 'one.safetensors'}", "/abs")
    assert in_file(tmp_path, text).codebooks == expected
    assert in_file(tmp_path, text, "mine").codebooks == ("mine",)


def test_paths_of_the_file_start_at_its_folder(tmp_path: Path) -> None:
    access = in_file(tmp_path, 'tls_cert = "server.crt"\ntls_key = "/run/server.key"\ntokens = ""').config.access
    assert (access.tls_cert, access.tls_key) == (str(tmp_path / "server.crt"), "/run/server.key")
    assert access.tokens == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prt = 1", "unknown key 'prt': did you mean port?"),
        ("max-batch-rows = 1", "unknown key 'max-batch-rows': did you mean max_batch_rows?"),
        ("codebook = []", "unknown key 'codebook': did you mean codebooks?"),
        ("[rpc]\nport = 1", "unknown key 'rpc'"),
        ("colour = 1", "unknown key 'colour'; `vqserved serve --print-config` lists all"),
        ("port = '1'", "port must be an integer, without quotes, not '1'"),
        ("port = 1.0", "port must be an integer, without quotes, not 1.0"),
        ("port = true", "port must be an integer, without quotes, not True"),
        ("port = 65536", "port must be an integer from 0 to 65535, not '65536'"),
        ("insecure = 1", "insecure must be true or false, without quotes, not 1"),
        ("drain_seconds = true", "drain_seconds must be a number, without quotes, not True"),
        ("drain_seconds = nan", "drain_seconds must be a number of seconds from 0 to 86400, not 'nan'"),
        ("host = 1", "host must be a text in quotes, not 1"),
        ("host = []", "host must be a text in quotes, not a list"),
        ("metrics_port = 1.0", 'metrics_port must be an integer, without quotes, or "auto", not 1.0'),
        ("metrics_port = false", 'metrics_port must be an integer, without quotes, or "auto", not False'),
        ("metrics_port = 65536", "metrics_port must be an integer from 0 to 65535, not '65536'"),
        ("codebooks = 'books'", "codebooks must be a list of files, folders and NAME=FILE"),
        ("port = ", "is not valid TOML: Invalid value (at end of document)"),
        ("tls_key = 'a'", "--tls-cert and --tls-key need each other"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        in_file(tmp_path, text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(("text", "port"), [("9465", 9465), ("0", 0), ("'9465'", 9465), ("'auto'", 9464)])
def test_the_metrics_port_is_a_number_in_the_file_too(tmp_path: Path, text: str, port: int) -> None:
    found = in_file(tmp_path, f"metrics_port = {text}")
    assert found.config.metrics.port == port
    assert f"metrics_port = {text.replace(chr(39), chr(34)) if port == 9464 else port}\n" in config.settings_file(found)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"cannot read the settings in .*missing\.toml: No such file"):
        config.resolve({"config": str(tmp_path / "missing.toml")}, {})


def test_the_printed_file_gives_the_same_settings(tmp_path: Path) -> None:
    flags = {
        **{"insecure": True, "host": 'a"b\\c', "port": 7, "drain_seconds": 0.1, "idle_seconds": 86400.0},
        **{"tokens": "/t", "sources": ["/books", 'x="y'], "log_level": "error"},
    }
    found = config.load(flags, {})
    again = in_file(tmp_path, config.settings_file(found))
    assert again.config == found.config
    # From wherever it is used.
    assert again.codebooks == ("/books", f"x={Path.cwd() / chr(34)}y")
    assert again.origins.keys() == found.origins.keys()


def test_any_path_can_be_printed(tmp_path: Path) -> None:
    found = config.load({"sources": ["/b\U0001f600\u00e4\n\x7f\t/x"], "tokens": "/\U0001f600"}, {})
    again = in_file(tmp_path, config.settings_file(found))
    assert (again.codebooks, again.config) == (found.codebooks, found.config)


def test_a_path_that_toml_cannot_have_is_named() -> None:
    with pytest.raises(config.ConfigError, match=r"codebooks '/b\\udcff' is not UTF-8"):
        config.settings_file(config.load({"sources": ["/b\udcff"]}, {}))


@pytest.mark.parametrize("key", ["tokens", "tls_cert", "unix_socket", "host"])
def test_a_text_with_a_zero_byte_is_a_mistake(tmp_path: Path, key: str) -> None:
    with pytest.raises(config.ConfigError, match=rf"{key} must not have a zero byte"):
        in_file(tmp_path, f'{key} = "/a\\u0000b"\n')


def test_the_defaults_in_a_printed_file_are_the_defaults(tmp_path: Path) -> None:
    text = config.settings_file(config.load({}, {}))
    assert in_file(tmp_path, text).origins == {}
    # Each comment with a key is an entry; one that names the demo codebook would need its file.
    entries = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    assert {entry.partition(" = ")[0] for entry in entries} == {*(each.name for each in config.SETTINGS), "codebooks"}
    assert in_file(tmp_path, os.linesep.join(entries)).config == config.ServeConfig()


def test_the_documented_file_is_valid(tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    found = in_file(tmp_path, text)
    assert found.origins.keys() == {line.partition(" = ")[0] for line in text.splitlines()}
    assert found.codebooks == ("/srv/codebooks", "faces=/srv/faces.safetensors")
