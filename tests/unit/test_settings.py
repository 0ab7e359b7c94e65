"""Where settings come from and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from wire.loading import ENV_PREFIX, load
from wire.settings import (
    CriticSettings,
    EngineSettings,
    MediaSettings,
    ServerSettings,
    SettingError,
    Settings,
    TracingSettings,
    each_setting,
)


def test_nothing_given_means_the_defaults() -> None:
    assert load({}, {}) == Settings()


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\nhost = 'file'\nblock_size = 4\n")
    env = {"INTERNVL_PORT": "2", "INTERNVL_HOST": "environment"}
    settings = load({"port": "3"}, env, file)
    assert (settings.server.port, settings.server.host) == (3, "environment")
    assert settings.engine.block_size == 4


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "8080", 8080),
        ("drain_timeout", "2.5", 2.5),
        ("allow_private_media", "yes", True),
        ("allow_private_media", "False", False),
        ("api_key", "one, two,,", ("one", "two")),
        ("api_key", "", ()),
        ("api_key_weights", "", ()),
        ("model", "/a/b", "/a/b"),
        ("max_model_len", "0", 0),
        ("gpu_memory_utilization", "1", 1.0),
    ],
)
def test_text_becomes_the_settings_type(name: str, text: str, value: object) -> None:
    settings = load({}, {ENV_PREFIX + name.upper(): text})
    group = next(g for g, field, _ in each_setting() if field.name == name)
    found = getattr(getattr(settings, group), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "eighty"),
        ("port", "80.5"),
        ("port", ""),
        ("drain_timeout", "nan"),
        ("drain_timeout", "-0.1"),
        ("gpu_memory_utilization", "1.01"),
        ("allow_private_media", "perhaps"),
        ("device", "tpu"),
        ("block_size", "0"),
        ("api_key_weights", "1,many"),
    ],
)
def test_a_value_that_is_not_allowed_is_fatal_and_names_its_source(name: str, text: str) -> None:
    with pytest.raises(SettingError, match=ENV_PREFIX + name.upper()):
        load({}, {ENV_PREFIX + name.upper(): text})
    with pytest.raises(SettingError, match="--" + name.replace("_", "-")):
        load({name: text}, {})


@pytest.mark.parametrize(
    "line",
    [
        "port = '80x'",
        "port = 80.5",
        "port = true",
        "port = [1]",
        "allow_private_media = 2",
        "unknown = 1",
        "host = {a = 1}",
        "host = ['a']",
        "api_key = [['a']]",
        "api_key = {a = 1}",
        f"port = {'[' * 10_000}",
        "port = ",
    ],
)
def test_a_wrong_file_is_fatal(tmp_path: Path, line: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line)
    with pytest.raises(SettingError):
        load({}, {}, file)


def yaml(folder: Path, text: str | bytes, name: str = "settings.yaml") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_yaml_says_the_same_as_toml(tmp_path: Path) -> None:
    toml = tmp_path / "settings.toml"
    toml.write_text(
        "port = 9000\nhost = '::'\napi_key = ['0123', 'yes']\ndrain_timeout = 2.5\n"
        "allow_private_media = true\nsystem_prompt = 'a: b # c'\nmax_model_len = 0\n"
    )
    text = (
        "# comment\nport: 9000\nhost: '::'\napi_key: [0123, yes]\ndrain_timeout: 2.5\n"
        "allow_private_media: yes\nsystem_prompt: 'a: b # c'\nmax_model_len: 0\n"
    )
    for name in ("a.yaml", "a.yml", "a.YAML"):
        assert load({}, {}, yaml(tmp_path, text, name)) == load({}, {}, toml)
    block = yaml(tmp_path, "api_key:\n  - 2024-01-01\n  - 1e3\n")
    assert load({}, {}, block).server.api_key == ("2024-01-01", "1e3")
    assert load({}, {}, yaml(tmp_path, "# nothing\n")) == Settings()
    assert load({"port": "3"}, {"INTERNVL_HOST": "h"}, yaml(tmp_path, text)).server.port == 3


BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(9)) + "port: *b8\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: eighty", "port in .*settings.yaml: 'eighty' is not a valid int"),
        ("port: 70000", "port in .*settings.yaml: 70000 must be"),
        ("device: tpu", "'tpu' is not one of"),
        ("prot: 1", "unknown setting 'prot' in .*settings.yaml"),
        ("a: 1\n\nport: 80\nport: 81", "line 4 gives 'port' a second time"),
        ("port:", "'port' in line 1 needs a value"),
        ("port: ~", "'port' in line 1 needs a value"),
        ("port: {a: 1}", "'port' in line 1 needs a value"),
        ("host: [[a]]", "'host' in line 1 needs a value"),
        ("host: [a, b]", "host in .*: .* is not a valid str"),
        ("host: !!python/object/apply:os.system [ls]", "unknown|needs a value|not a valid"),
        ("host: !!python/name:os.system ''", "'host' in line 1 needs a value"),
        ("host: !secret x", "'host' in line 1 needs a value"),
        ("host: *nowhere", "undefined alias in line 1|'nowhere' in line 1"),
        (BOMB, "needs a value"),
        ("[1, 2]", "no list of names"),
        ("just text", "no list of names"),
        ("? [a]\n: 1", "line 1 begins with something else"),
        ("<<: {port: 1}", "needs a value"),
        ("a: 1\n---\nb: 2", "cannot be read"),
        ("host: 'unclosed", "cannot be read"),
        ("\thost: x", "line 1"),
        ("host: \x00", "characters"),
        (b"host: \xff", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ("#" * (1 << 20) + "#", "more than 1 MiB"),
    ],
)
def test_a_wrong_yaml_file_names_what_is_wrong(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    with pytest.raises(SettingError, match=says) as raised:
        load({}, {}, yaml(tmp_path, text))
    assert "settings.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_stands_in_a_file_is_not_told_with_its_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as raised:
        load({}, {}, yaml(tmp_path, "api_key: [hunter2, 'x\n"))
    assert "hunter2" not in str(raised.value)


def test_a_key_in_a_table_is_not_told_with_its_error(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('api_key = {name = "sekret"}')
    with pytest.raises(SettingError, match=r"api_key in .*: a dict is not a valid list") as raised:
        load({}, {}, file)
    assert "sekret" not in str(raised.value)


def test_a_file_may_hold_lists_and_booleans(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("api_key = ['a', 'b']\nallow_private_media = true\n")
    settings = load({}, {}, file)
    assert settings.server.api_key == ("a", "b")
    assert settings.media.allow_private_media is True


def test_weights_stand_beside_the_keys() -> None:
    settings = load({"api_key": "a,b", "api_key_weights": "1, 0.5"}, {})
    assert settings.server.api_key_weights == (1.0, 0.5)
    for keys, weights in (
        ("a", "1,2"),
        ("", "1"),
        ("a", "0"),
        ("a", "-1"),
        ("a", "nan"),
        ("a", "inf"),
    ):
        with pytest.raises(SettingError, match="api_key_weights"):
            load({"api_key": keys, "api_key_weights": weights}, {})


def test_a_critic_is_one_process_whatever_the_first_engine_is(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a" * 16)
    split = {"tensor_parallel_size": "2", "pipeline_parallel_size": "2", "nodes": "2"}
    split |= {"rank_secret_file": str(secret)}
    settings = load(split | {"critic_model": "there", "critic_max_model_len": "77"}, {})
    assert settings.engine.processes == 4
    critic = settings.critic_engine
    assert (critic.processes, critic.nodes) == (1, 1)
    assert (critic.model, critic.max_model_len) == ("there", 77)


def test_a_missing_file_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        load({}, {}, tmp_path / "absent.toml")


def test_an_unknown_flag_is_fatal_but_other_environment_variables_are_not_ours() -> None:
    with pytest.raises(SettingError, match="no_such"):
        load({"no_such": "1"}, {})
    assert load({}, {"PORT": "1", "INTERNVL_SOMETHING_ELSE": "x"}) == Settings()


def test_names_are_unique_and_every_setting_has_a_help_text_and_a_valid_default() -> None:
    names = [field.name for _, field, _ in each_setting()]
    assert len(set(names)) == len(names)
    groups = (ServerSettings, MediaSettings, EngineSettings, CriticSettings, TracingSettings)
    assert len(names) == sum(len(dataclasses.fields(group)) for group in groups)
    for _, field, _ in each_setting():
        metadata = field.metadata
        assert metadata["help"].rstrip().endswith((".", ")"))
        assert metadata["choices"] is None or field.default in metadata["choices"]
        assert metadata["low"] is None or field.default >= metadata["low"]
        assert metadata["high"] is None or field.default <= metadata["high"]
