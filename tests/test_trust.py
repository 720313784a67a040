"""The chain of trust: signatures, provenance, ML-BOM, and builds that are repeated from a provenance elsewhere."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flora_export.artifact import open_artifact
from flora_export.cli import main
from tests.families import make_adapter, make_lora

pytest.importorskip("model_signing", reason="the extra trust is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *words: str) -> None:
    """One line of an error, with those words, and no traceback."""
    assert result.exit_code == code, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error
    assert "Traceback" not in result.output
    assert result.stdout == ""


def save_key(key: Any, path: Path) -> Path:
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.with_suffix(".pem").write_bytes(private)
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path.with_suffix(".pem")


def certify(name: str, key: Any, issuer: str, issuer_key: Any, file: Path, *, authority: bool) -> Path:
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
    builder = x509.CertificateBuilder(named[1], named[0], key.public_key(), x509.random_serial_number(), start, start.replace(year=2036))
    builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
    flags = dict.fromkeys(unused, False) | {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    builder = builder.add_extension(x509.KeyUsage(**flags), critical=True)
    file.write_bytes(builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours and theirs; ca, and other, which has issued nothing; leaf, of ca."""
    place = tmp_path_factory.mktemp("keys")
    made = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ours", "theirs", "ca", "other", "leaf")}
    for name, key in made.items():
        save_key(key, place / name)
    for name in ("ca", "other"):
        certify(name, made[name], name, made[name], place / f"{name}.crt", authority=True)
    certify("leaf", made["leaf"], "ca", made["ca"], place / "leaf.crt", authority=False)
    return place


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    result = run("build", adapter, "--base", base, "--backend", "onnxruntime", "--output", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def signed(built: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(built, tmp_path_factory.mktemp("signed") / "out")
    result = run("sign", out, "--key", keys / "ours.pem")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def out(signed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(signed, tmp_path / "out")


def test_signed_artifact_verifies(signed: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(signed)  # which OUT itself may be
    assert run("verify", tmp_path / "current", "--signer", keys / "ours.pub").exit_code == 0
    result = run("verify", signed, "--signer", keys / "ours.pub")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("VERIFIED")
    import model_signing

    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys / "ours.pub").verify(signed, signed / "model.sig")  # agrees
    bundle = json.loads((signed / "model.sig").read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    names = {resource["name"] for resource in payload["predicate"]["resources"]}
    assert names == {file.name for file in signed.iterdir()} - {"model.sig"}
    assert {"manifest.json", "report.json", "provenance.json", "model.onnx.data"} <= names


def flip(name: str) -> Callable[[Path], None]:
    """One bit of a file, at its middle."""

    def change(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)

    return change


def reformat(out: Path) -> None:
    """The manifest says the same, in other bytes: nothing but a signature can tell."""
    (out / "manifest.json").write_text(json.dumps(json.loads((out / "manifest.json").read_text())))


def lie(out: Path) -> None:
    """The manifest is another, and is sound by itself."""
    content = json.loads((out / "manifest.json").read_text())
    content["verified"] = not content["verified"]
    (out / "manifest.json").write_text(json.dumps(content))


def add(name: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")

    return change


def link(out: Path) -> None:
    (out / "more.json").symlink_to(out / "manifest.json")


def no_hint(out: Path) -> None:
    """A signature of the oldest form, which model-signing prints a warning of, on other files."""
    bundle = json.loads((out / "model.sig").read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    (out / "model.sig").write_text(json.dumps(bundle))
    reformat(out)


def unlisted(out: Path) -> None:
    """The bundle's payload names one file less, and that one is gone."""
    bundle = json.loads((out / "model.sig").read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"] = [r for r in payload["predicate"]["resources"] if r["name"] != "report.json"]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (out / "model.sig").write_text(json.dumps(bundle))
    (out / "report.json").unlink()


TOUCHES: dict[str, Callable[[Path], None]] = {
    "manifest, reformatted": reformat,
    "manifest, another": lie,
    "weights": flip("model.onnx.data"),
    "graph": flip("model.onnx"),
    "report": flip("report.json"),
    "provenance": flip("provenance.json"),
    "signature": flip("model.sig"),
    "signature, empty": lambda out: (out / "model.sig").write_text(""),
    "signature, no bundle": lambda out: (out / "model.sig").write_text("{}"),
    "signature, a list": lambda out: (out / "model.sig").write_text("[" * 100_000),
    "signature, old": no_hint,
    "signature, of less": unlisted,
    "a file more": add("more.json"),
    "a hidden file more": add(".gitattributes"),
    "a file in a directory more": add(".git/config"),
    "a link more": link,
    "a FIFO more": lambda out: os.mkfifo(out / "more.json"),
    "a file less": lambda out: (out / "report.json").unlink(),
    "unsigned": lambda out: (out / "model.sig").unlink(),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_whatever_is_touched_is_refused(out: Path, keys: Path, touch: Callable[[Path], None]) -> None:
    touch(out)
    refused(run("verify", out, "--signer", keys / "ours.pub"), 1, str(out))


def test_a_touched_manifest_is_named_and_not_published(out: Path, keys: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    reformat(out)
    assert run("verify", out).exit_code == 0  # which is what a signature is for
    refused(result := run("verify", out, "--signer", keys / "ours.pub"), 1, "mismatch for 'manifest.json'", "fetch them again")
    assert "digest_value" not in result.stderr
    refused(run("triton", out, repo, "--signer", keys / "ours.pub"), 1, "manifest.json")
    assert not repo.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_publish(signed: Path, keys: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient")
    repo = tmp_path / "repo"
    refused(run("triton", signed, repo, "--signer", keys / "theirs.pub"), 1, "Key mismatch")
    assert not repo.exists()
    result = run("triton", signed, repo, "--signer", keys / "ours.pub")
    assert result.exit_code == 0, result.output
    version = repo / "decoder" / "1"
    assert (version / "provenance.json").read_bytes() == (signed / "provenance.json").read_bytes()
    assert not (version / "model.sig").exists()  # docs/trust.md: the source is checked, once
    assert run("triton", repo, "--check").exit_code == 0
    assert run("triton", repo, "--check", "--signer", keys / "ours.pub").exit_code == 2


def test_others_are_refused(signed: Path, built: Path, keys: Path) -> None:
    refused(run("verify", signed, "--signer", keys / "theirs.pub"), 1, "theirs.pub", "Key mismatch")
    refused(run("verify", built, "--signer", keys / "ours.pub"), 1, "not signed")
    refused(run("verify", signed, "--signer-ca", keys / "ca.crt"), 1, "ca.crt")
    result = run("verify", signed, "--signer", keys / "theirs.pub", "--json")
    assert json.loads(result.stdout)["error"] == "VerificationError"


def test_certificates(built: Path, keys: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    command = ("sign", out, "--key", keys / "leaf.pem", "--certificate", keys / "leaf.crt")
    assert run(*command, "--certificate-chain", keys / "ca.crt").exit_code == 0
    assert run("verify", out, "--signer-ca", keys / "ca.crt").exit_code == 0
    refused(run("verify", out, "--signer-ca", keys / "other.crt"), 1, "other.crt")
    refused(run("verify", out, "--signer", keys / "leaf.pub"), 1, "leaf.pub")
    reformat(out)
    refused(run("verify", out, "--signer-ca", keys / "ca.crt"), 1, "manifest.json")
    assert run(*command).exit_code == 2  # no chain
    refused(run("sign", out, "--key", keys / "ours.pem", *command[4:], "--certificate-chain", keys / "ca.crt"), 2, "does not match")
    assert run("verify", out, "--signer", keys / "leaf.pub", "--signer-ca", keys / "ca.crt").exit_code == 2


def test_keys_that_are_none(signed: Path, built: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(os.urandom(100))
    large = save_key(rsa.generate_private_key(public_exponent=65537, key_size=2048), tmp_path / "rsa")
    curve = save_key(ec.generate_private_key(ec.SECP256K1()), tmp_path / "curve")
    locked = tmp_path / "locked.pem"
    key = serialization.load_pem_private_key((keys / "ours.pem").read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted))
    before = sorted(built.iterdir())
    for file in (tmp_path, tmp_path / "garbage", tmp_path / "absent", large, curve, locked, keys / "ours.pub"):
        refused(run("sign", built, "--key", file), 2, str(file), "P-256")
    for file in (tmp_path, tmp_path / "garbage", tmp_path / "absent", large.with_suffix(".pub"), curve.with_suffix(".pub")):
        refused(run("verify", signed, "--signer", file), 2, str(file), "P-256")
        refused(run("verify", signed, "--signer-ca", file), 2, str(file), "certificates in PEM")
    assert sorted(built.iterdir()) == before


def test_what_is_damaged_is_not_signed(built: Path, keys: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    flip("model.onnx.data")(out)
    result = run("sign", out, "--key", keys / "ours.pem")
    assert result.exit_code == 1
    assert "model.onnx.data" in result.stderr
    refused(run("sign", tmp_path, "--key", keys / "ours.pem"), 2, "no artifact")
    assert not (out / "model.sig").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_said(signed: Path, built: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refused(run("verify", signed, "--signer", keys / "ours.pub"), 3, "flora-export[trust]")
    monkeypatch.setitem(sys.modules, "packageurl", None)
    refused(run("bom", built), 3, "flora-export[trust]")
    assert run("verify", signed).exit_code == 0  # which needs neither


def test_build_appears_signed(base: Path, adapter: Path, keys: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("build", adapter, "--base", base, "--backend", "hf", "--no-verify", "--output", out)
    refused(run(*command, "--sign", keys / "ours.pub"), 2, "ours.pub")
    assert not out.exists()
    mlp = make_adapter(base, tmp_path / "mlp", target_modules=["mlp"])
    result = run("build", mlp, *command[2:], "--sign", keys / "ours.pem")
    assert result.exit_code == 0, result.output
    assert run("bom", out).exit_code == 2  # it is signed
    from flora_export.proof import check_ledger
    from flora_export.trust.signature import Signer, check_signature

    check_signature(out, Signer(keys / "ours.pub"))
    assert check_ledger(open_artifact(out)).faults == []  # a checkpoint's directory takes no strangers, and this is none
    assert run("build", adapter, "--backend", "triton", "--output", out, "--sign", keys / "ours.pem").exit_code == 2


def test_provenance(built: Path, base: Path, adapter: Path) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement, statement_pb2

    text = (built / "provenance.json").read_text()
    parsed = json_format.Parse(text, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    predicate = json_format.Parse(json.dumps(json.loads(text)["predicate"]), provenance_pb2.Provenance())
    definition = predicate.build_definition
    manifest = open_artifact(built).manifest
    hashes = {name: known["sha256"] for name, known in manifest.files.items()}
    assert hashes.pop("provenance.json")
    assert {each.name: each.digest["sha256"] for each in parsed.subject} == hashes
    inputs = {f"base/{name}": sha for name, sha in manifest.base["files"].items()}
    inputs |= {f"adapter/{name}": sha for name, sha in manifest.checkpoint["files"].items()}
    assert {each.name: each.digest["sha256"] for each in definition.resolved_dependencies} == inputs
    assert json_format.MessageToDict(definition.internal_parameters) == {"versions": manifest.versions}
    options = json_format.MessageToDict(definition.external_parameters)
    assert (options["backend"], options["precision"], options["fuse"], options["verify"]) == ("onnxruntime", "fp32", "both", True)
    (verification,) = predicate.run_details.byproducts
    assert dict(verification.annotations)["verified"] is True
    assert not any(str(place) in text for place in (base, adapter, built.parent, Path.home()))


def test_bom(built: Path, base: Path, adapter: Path, keys: Path, tmp_path: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema")
    from cyclonedx.schema import SchemaVersion

    out = shutil.copytree(built, tmp_path / "out")
    carded = shutil.copytree(base, tmp_path / "base")
    (carded / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\nlicense: mit\n")
    own = shutil.copytree(adapter, tmp_path / "adapter")
    (own / "README.md").write_text('---\nlicense: other\nlicense_name: "house rules"\n---\n')
    assert run("bom", out, "--base", carded, "--ckpt", own).exit_code == 0
    text = (out / "bom.cdx.json").read_text()
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    manifest = open_artifact(out).manifest
    assert content["specVersion"] == "1.6"
    assert "timestamp" not in content["metadata"]
    parts = {part["bom-ref"]: part for part in [content["metadata"]["component"], *content["components"]]}
    assert {parts[name]["type"] for name in ("artifact", "base", "adapter")} == {"machine-learning-model"}
    assert parts["base"]["licenses"] == [{"license": {"acknowledgement": "declared", "id": "Apache-2.0"}}]
    assert parts["adapter"]["licenses"] == [{"license": {"acknowledgement": "declared", "name": "house rules"}}]
    assert {f["name"]: f["hashes"][0]["content"] for f in parts["base"]["components"]} == manifest.base["files"]
    assert {f["name"] for f in parts["artifact"]["components"]} == {"manifest.json", *manifest.files}
    assert {p["name"]: p["version"] for p in parts.values() if p["type"] == "library"} == manifest.versions
    assert not any(str(place) in text for place in (tmp_path, base, Path.home()))

    assert run("bom", out, "--base", carded, "--ckpt", own).exit_code == 0
    assert (out / "bom.cdx.json").read_text() == text  # of one artifact there is one text
    assert run("bom", out).exit_code == 0
    assert "licenses" not in (out / "bom.cdx.json").read_text()
    assert run("sign", out, "--key", keys / "ours.pem").exit_code == 0
    assert run("verify", out, "--signer", keys / "ours.pub").exit_code == 0
    refused(run("bom", out), 2, "is signed")
    flip("bom.cdx.json")(out)
    refused(run("verify", out, "--signer", keys / "ours.pub"), 1, "bom.cdx.json")
    other = make_adapter(base, tmp_path / "other", seed=7)
    (out / "model.sig").unlink()
    refused(run("bom", out, "--ckpt", other), 2, "adapter_model.safetensors")


def reproduce_elsewhere(out: Path, base: Path, ckpts: list[Path], place: Path) -> subprocess.CompletedProcess[str]:
    """In another process, with another home and other settings, from copies in other places."""
    for name in ("home", "tmp", "cwd"):
        (place / name).mkdir(parents=True)
    copies = [shutil.copytree(ckpt, place / f"ckpt{index}") for index, ckpt in enumerate(ckpts)]
    command = [sys.executable, "-m", "flora_export.cli", "reproduce", shutil.copytree(out, place / "copy"), "--json"]
    command += ["--base", shutil.copytree(base, place / "the base")]
    command += [part for copy in copies for part in ("--ckpt", copy)]
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    environment |= {"PYTHONHASHSEED": "7", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place / "cwd", env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert not list((place / "tmp").glob("*flora*"))
    return done


def test_a_build_is_reproduced_elsewhere(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    done = reproduce_elsewhere(built, base, [adapter], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differ"] == []
    assert set(found["same"]) == {file.name for file in built.iterdir()} - {"report.json"}


def test_options_are_reproduced_and_what_differs_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Options that are not defaults, of a backend as well: but for what has changed since, each byte is the same."""
    out = tmp_path / "out"
    options = ("--precision", "int8", "--block-size", "16", "--fuse", "forward", "--align", "16", "--no-verify")
    assert run("build", adapter, "--base", base, "--backend", "onnxruntime", *options, "--output", out).exit_code == 0
    flip("model.onnx.data")(out)
    (out / "config.json").unlink()
    result = run("reproduce", out, "--ckpt", adapter, "--base", base, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [line.partition(":")[0] for line in found["differ"]] == ["config.json", "model.onnx.data"]
    assert {"manifest.json", "model.onnx", "provenance.json"} <= set(found["same"])


def test_several_loras_are_reproduced(base: Path, tmp_path: Path) -> None:
    one, two = (make_lora(base, tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2))
    out = tmp_path / "out"
    command = ("build", f"{one}=0.7", "--adapter", f"{two}=0.25", "--base", base, "--backend", "onnxruntime", "--no-verify")
    assert run(*command, "--output", out).exit_code == 0
    result = run("reproduce", out, "--ckpt", one, "--ckpt", two, "--base", base)
    assert result.exit_code == 0, result.output
    refused(run("reproduce", out, "--ckpt", two, "--ckpt", one, "--base", base), 2, "in their order")
    refused(run("reproduce", out, "--ckpt", one, "--base", base), 2, "2 adapters, but 1")


def test_a_rebuilt_engine_is_neither_signed_nor_has_a_provenance(signed: Path, keys: Path, tmp_path: Path) -> None:
    """What `rebuild` keeps of the artifact that it makes another engine for. tests/test_runtime.py has the same of `set-adapter`."""
    from flora_export.rebuild import _share

    (tmp_path / "out").mkdir()
    _share(signed, tmp_path / "out", ("model.onnx",))
    gone = {"manifest.json", "provenance.json", "model.sig", "model.onnx"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in signed.iterdir()} - gone


def test_the_options_of_a_bank_are_read(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from flora_export.methods.bank import BankOptions
    from flora_export.reproduce import read_options

    bank, (first, second, _) = tmp_path / "bank", adapters.values()
    command = ("build", first, second, "--name", "x", "--name", "y", "--slots", 4, "--base", base, "--backend", "onnxruntime")
    assert run(*command, "--no-verify", "--output", bank).exit_code == 0
    assert read_options(open_artifact(bank), [first, second]).bank == BankOptions((("x", first), ("y", second)), slots=4)
    refused(run("reproduce", bank, "--ckpt", second, "--ckpt", first, "--base", base), 2, "in their order")


def test_other_inputs_and_no_provenance(built: Path, base: Path, bases: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(base, tmp_path / "other", seed=7)
    refused(run("reproduce", built, "--ckpt", other, "--base", base), 2, "adapter_model.safetensors", "was built from")
    refused(run("reproduce", built, "--ckpt", adapter, "--base", bases("qwen2")), 2, "config.json", "was built from")
    assert run("reproduce", built).exit_code == 2
    hostile = shutil.copytree(built, tmp_path / "hostile")
    content = json.loads((built / "provenance.json").read_text())
    options = content["predicate"]["buildDefinition"]["externalParameters"]
    for wrong in (
        {"fuse": "all"},
        {"align": "8"},
        {"settings": {"nothing": 1}},
        {"weights": 3},
        {"force": True},
        {"backend": "abacus"},
        {"weights": ["x"]},
        {"precision": "int8", "settings": {"block_size": "x"}},
        {"names": [1]},
    ):
        content["predicate"]["buildDefinition"]["externalParameters"] = options | wrong
        (hostile / "provenance.json").write_text(json.dumps(content))
        refused(run("reproduce", hostile, "--ckpt", adapter, "--base", base), 2, "provenance")
    (hostile / "provenance.json").write_text("{}")
    refused(run("reproduce", hostile, "--ckpt", adapter, "--base", base), 2, "not a provenance")


def test_a_bom_is_not_written_through_a_link(built: Path, tmp_path: Path) -> None:
    out, outside = shutil.copytree(built, tmp_path / "out"), tmp_path / "outside"
    outside.write_text("mine")
    (out / "bom.cdx.json").symlink_to(outside)
    assert run("bom", out).exit_code == 0
    assert outside.read_text() == "mine"
    assert not (out / "bom.cdx.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "outside"]


def test_a_file_that_no_build_makes_is_no_reproduction(built: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    result = run("reproduce", out, "--ckpt", adapter, "--base", base)
    assert result.exit_code == 1
    assert "chat_template.jinja: the second build has none" in result.output


def test_a_manifest_names_the_adapters_files(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    content = json.loads((out / "manifest.json").read_text())
    del content["checkpoint"]["files"]
    (out / "manifest.json").write_text(json.dumps(content))
    refused(run("bom", out), 2, "manifest.json")


def test_an_artifact_without_provenance_opens(built: Path, base: Path, adapter: Path, keys: Path, tmp_path: Path) -> None:
    """As those that were built before there was one."""
    from flora_export.artifact import seal

    old = shutil.copytree(built, tmp_path / "old")
    (old / "provenance.json").unlink()
    result = run("verify", old)
    assert result.exit_code == 1
    assert "provenance.json is missing" in result.output
    seal(old, open_artifact(old).manifest)
    assert run("verify", old).exit_code == 0
    refused(run("verify", old, "--signer", keys / "ours.pub"), 1, "not signed")
    refused(run("reproduce", old, "--ckpt", adapter, "--base", base), 2, "has no provenance.json")
