"""onnxruntime computes from model.onnx what PyTorch computes, for every batch size and length."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import DECODER, MLM, NSP, POOLER, random_model, without, write_vocab

from clue_ds import export
from clue_ds.cli import main
from clue_ds.errors import UserError
from clue_ds.export import FineTuned
from clue_ds.export.onnx_model import file
from clue_ds.model.weights import StateDict
from clue_ds.presets import ModelConfig

CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
    hidden_act="gelu_new",
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def session_of(state: StateDict, tmp_path: Path) -> onnxruntime.InferenceSession:
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    return opened(export.save(CONFIG, state, vocab_file, tmp_path / "onnx", to="onnx"))


def opened(directory: Path) -> onnxruntime.InferenceSession:
    path = str(directory / "model.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnxruntime_agrees_with_pytorch_at_every_size(tmp_path: Path) -> None:
    model = random_model(CONFIG, 0)
    session = session_of(dict(model.state_dict()), tmp_path)
    for batch, length in ((1, 1), (1, 32), (5, 3), (2, 7)):
        ids = torch.randint(CONFIG.vocab_size, (batch, length))
        types = torch.randint(2, (batch, length))
        lengths = torch.randint(1, length + 1, (batch,))
        mask = (torch.arange(length) < lengths[:, None]).long()
        feed = dict(zip(INPUTS, (t.numpy() for t in (ids, mask, types)), strict=True))
        found = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True)
        )
        with torch.no_grad():
            expected = model(ids, types, attention_mask=mask)
            hidden = model.bert(ids, types, attention_mask=mask)
        real = mask.bool().numpy()  # what stands in padding means nothing
        for name, value in (
            ("last_hidden_state", hidden),
            ("logits", expected.prediction_logits),
        ):
            # fp32 in another order of operations, logits up to 20.
            np.testing.assert_allclose(found[name][real], value.numpy()[real], atol=2e-5, rtol=0)
        np.testing.assert_allclose(
            found["seq_relationship_logits"], expected.seq_relationship_logits.numpy(), atol=2e-5
        )


def test_outputs_are_those_whose_weights_are_there(tmp_path: Path) -> None:
    state = without(dict(random_model(CONFIG, 0).state_dict()), MLM, NSP, POOLER)
    session = session_of(state, tmp_path)
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state"]
    assert [i.name for i in session.get_inputs()] == list(INPUTS)


def test_missing_extra_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'clue_ds\[onnx\]'"):
        session_of(dict(random_model(CONFIG, 0).state_dict()), tmp_path)


def classifier(num_labels: int = 3) -> StateDict:
    state = without(dict(random_model(CONFIG, 0).state_dict()), MLM, NSP)
    torch.manual_seed(1)
    weight = torch.randn(num_labels, CONFIG.hidden_size)
    return state | {"classifier.weight": weight, "classifier.bias": torch.randn(num_labels)}


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_optimizers_fuse_every_attention(activation: str, tmp_path: Path) -> None:
    """Fused by onnxruntime's optimizer of transformers: one node for each of the parts."""
    from onnxruntime.transformers import optimizer

    config = CONFIG.replace(hidden_act=activation)
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    path = (
        export.save(config, classifier(), vocab_file, tmp_path / "onnx", to="onnx") / "model.onnx"
    )
    heads, size = config.num_attention_heads, config.hidden_size
    found = optimizer.optimize_model(str(path), "bert", heads, size, opt_level=0)
    counts = found.get_fused_operator_statistics()
    assert counts["Attention"] == config.num_hidden_layers
    assert counts["EmbedLayerNormalization"] == 1
    assert counts["SkipLayerNormalization"] == 2 * config.num_hidden_layers
    # The optimizer also joins the bias with the erf form, and calls that BiasGelu.
    gelus = ("BiasGelu", "Gelu") if activation == "gelu" else ("FastGelu",)
    assert sum(counts[name] for name in gelus) == config.num_hidden_layers


def test_file_says_nothing_of_the_machine_and_loads_in_old_runtimes(tmp_path: Path) -> None:
    session_of(classifier(), tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8, "what onnxruntime 1.14 reads"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert "IsNaN" not in {node.op_type for node in model.graph.node}
    assert not model.metadata_props and not any(n.doc_string for n in model.graph.node)
    content = path.read_bytes()
    for place in (str(tmp_path), str(Path(__file__).parents[1]), "site-packages", ".py"):
        assert place.encode() not in content
    num_bytes = 4 * sum(tensor.numel() for tensor in classifier().values())
    assert path.stat().st_size < num_bytes + 30_000


@pytest.mark.parametrize("opset", sorted(file.IR_VERSIONS))
def test_every_opset_computes_the_same(opset: int, tmp_path: Path) -> None:
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    directory = tmp_path / "onnx"
    export.save(CONFIG, classifier(), vocab_file, directory, to="onnx", opset=opset)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert (model.ir_version, model.opset_import[0].version) == (file.IR_VERSIONS[opset], opset)
    with pytest.raises(UserError, match="--opset 12 is not one of 17, 18"):
        export.save(CONFIG, classifier(), vocab_file, tmp_path / "x", to="onnx", opset=12)


def test_classifiers_answer_under_the_usual_name(tmp_path: Path) -> None:
    """[B, labels] of one that classifies texts, [B, S, labels] of one that classifies tokens."""
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    ids = np.array([[2, 9, 8, 3], [2, 7, 3, 0]])
    feed = dict(zip(INPUTS, (ids, np.minimum(ids, 1), ids * 0), strict=True))
    for kind, shape in (("Sequence", (2, 3)), ("Token", (2, 4, 3))):
        about = FineTuned(("a", "b", "c"), architecture=f"BertFor{kind}Classification")
        state = classifier() if kind == "Sequence" else without(classifier(), POOLER)
        directory = export.save(
            CONFIG, state, vocab_file, tmp_path / kind, to="onnx", finetuned=about
        )
        session = opened(directory)
        names = [output.name for output in session.get_outputs()]
        assert "logits" in names and "classifier_logits" not in names
        (found,) = session.run(["logits"], feed)
        assert found.shape == shape


def test_untied_decoder_is_written_as_it_is(tmp_path: Path) -> None:
    state = dict(random_model(CONFIG, 0).state_dict())
    state[DECODER] = state[DECODER] * 2 + 1
    session_of(state, tmp_path)  # its export compares the logits with PyTorch's


def test_large_model_keeps_its_weights_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "PROTOBUF_LIMIT", 1000)
    session_of(classifier(), tmp_path)
    assert {"model.onnx", "model.onnx.data"} <= {p.name for p in (tmp_path / "onnx").iterdir()}
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))


def test_int8_is_measured_on_the_users_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab_file = write_vocab(tmp_path / "vocab.txt", CONFIG.vocab_size)
    about = FineTuned(("a", "b", "c"), max_length=8)
    model = export.save(CONFIG, classifier(), vocab_file, tmp_path / "hf", finetuned=about)
    rows = [{"sentence": "一丁七万丈三上下"[i % 5 :], "label": "abc"[i % 3]} for i in range(40)]
    texts = tmp_path / "dev.json"
    texts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = tmp_path / "out"
    command = ["export", str(model), "--to", "onnx", "--output", str(output)]
    assert main([*command, "--quantize", "int8"]) == 2
    assert main([*command, "--texts", str(texts)]) == 2
    assert "--quantize needs --texts FILE" in capsys.readouterr().err
    assert main([*command, "--quantize", "int8", "--texts", str(texts)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((output / "quantization.json").read_text(encoding="utf-8"))
    assert found["num_texts"] == 40 and found["changed_answers"] <= 8
    assert f"{found['changed_answers']} answers change" in printed and "accuracy" in printed
    weights = onnx.load(output / "model_quantized.onnx").graph.initializer
    assert sum(w.data_type == onnx.TensorProto.INT8 for w in weights) >= 6 * 2 + 1
    texts.write_text('{"title": "一"}\n', encoding="utf-8")
    assert main([*command, "--force", "--quantize", "int8", "--texts", str(texts)]) == 2
    assert f"{texts}:1: a line must have one of the fields" in capsys.readouterr().err
