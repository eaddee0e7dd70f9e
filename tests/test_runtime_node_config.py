"""Rules of a DICOM node: the documented example works, every mistake is one line that names it."""

from pathlib import Path

import pytest

from medmo_edge.errors import NodeError
from medmo_edge.runtime.node_config import read_node_config

GOOD = """
[node]
ae_title = "MEDMO"
spool = "spool"
accept_from = ["CT1", "PACS"]

[destinations.pacs]
kind = "c-store"
host = "127.0.0.1"
port = 104
ae_title = "PACS"

[destinations.web]
kind = "stow-rs"
url = "https://127.0.0.1/dicom-web/studies"

[[rules]]
name = "chest"
modality = ["cr", "DX"]
body_part = "CHEST"
questions = ["Locate the nodule."]
results = ["sr", "gsps"]
send_to = ["pacs", "web"]
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(text)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    config = read_node_config(_write(tmp_path, GOOD))
    assert config.spool == tmp_path / "spool" and config.host == "127.0.0.1"
    assert config.destinations["pacs"].calling_ae_title == "MEDMO"
    (rule,) = config.rules
    assert rule.matches("DX", "CHEST", "CT1") and rule.matches("cr", "chest", "any")
    assert not rule.matches("CT", "CHEST", "CT1") and not rule.matches("DX", "", "CT1")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('ae_title = "MEDMO"', 'ae_titel = "MEDMO"', "[node]: unknown key 'ae_titel'"),
        ('ae_title = "MEDMO"', "", "[node]: ae_title is missing"),
        ('ae_title = "MEDMO"', 'ae_title = "A\\\\B"', "1 to 16 printable ASCII"),
        ('ae_title = "MEDMO"', 'ae_title = "seventeen-letters"', "1 to 16 printable ASCII"),
        ('accept_from = ["CT1", "PACS"]', "accept_from = []", "not empty"),
        ('accept_from = ["CT1", "PACS"]', 'accept_from = ["a\\tb"]', "is no AE title"),
        ('spool = "spool"', 'spool = "spool"\nport = true', "port must be a whole number"),
        ('spool = "spool"', 'spool = "spool"\nport = 70000', "0 to 65535"),
        ('spool = "spool"', 'spool = "spool"\nuid_root = "1.x"', "UID root"),
        ('spool = "spool"', 'spool = "spool"\ntls = {certificate = "no.pem"}', "existing PEM"),
        ("port = 104", "", "[destinations.pacs]: port is missing"),
        ('kind = "c-store"', 'kind = "ftp"', "c-store or stow-rs"),
        ('"https://127.0.0.1/dicom-web/studies"', '"file:///etc"', "http:// or https://"),
        ('url = "https', 'port = 1\nurl = "https', "unknown key 'port'"),
        ("[destinations.web]", '[destinations."we b"]', "letters, digits"),
        ('"web"]', '"wbe"]', "rule 'chest': no destination 'wbe' (there is: pacs, web)"),
        ('["sr", "gsps"]', '["sr", "fhir"]', "a list of sr gsps sc"),
        ('["sr", "gsps"]', '["sr", "sr"]', "a list of sr gsps sc"),
        ("questions", "question", "unknown key 'question'"),
        ('questions = ["Locate the nodule."]', 'questions = [" "]', "a list of texts"),
        ('name = "chest"', 'name = "chest"\nframe = "last"', "frame number"),
        ('name = "chest"', 'name = "chest"\nmax_new_tokens = 0', "max_new_tokens"),
        ("[[rules]]", "[rules]", "rules must be list"),
        ("[[rules]]", "[[rule]]", "unknown key 'rule'"),
        ("[node]", "[node", "is no TOML file"),
    ],
)
def test_a_mistake_is_named_in_one_line(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(NodeError) as error:
        read_node_config(_write(tmp_path, GOOD.replace(old, new)))
    message = str(error.value)
    assert words in message and "\n" not in message and message.startswith(str(tmp_path))


def test_two_rules_have_two_names(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="two rules are named 'chest'"):
        read_node_config(_write(tmp_path, GOOD + GOOD[GOOD.index("[[rules]]") :]))


def test_a_missing_file_and_no_rules(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot be read"):
        read_node_config(tmp_path / "no.toml")
    with pytest.raises(NodeError, match="rules is missing"):
        read_node_config(_write(tmp_path, GOOD[: GOOD.index("[[rules]]")]))
    with pytest.raises(NodeError, match=r"there is no rule: add a \[\[rules\]\] table"):
        read_node_config(_write(tmp_path, "rules = []\n" + GOOD[: GOOD.index("[[rules]]")]))


def test_the_example_of_the_documentation_is_valid() -> None:
    config = read_node_config(Path(__file__).parents[1] / "examples" / "node.toml")
    assert [rule.name for rule in config.rules] == ["chest-nodule", "ct-middle-slice"]
