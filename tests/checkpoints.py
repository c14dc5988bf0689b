"""Tiny checkpoints of every family as transformers saves them: random weights, tokenisers learned on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

hf: Any = transformers  # whose classes take whatever a configuration may say
SENTENCES = [
    "a photo of a cat that sits on a mat",
    "A dog, barking loudly in the rain!",
    "two people talk (quietly) about music",
    "the sound of waves and wind; 3 birds",
    "Ein Fluss fließt durch die Stadt",
]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _bytes_bpe(special: list[str], suffix: str = "") -> tuple[dict[str, int], list[Any]]:
    tokenizer = Tokenizer(BPE(end_of_word_suffix=suffix) if suffix else BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if suffix:
        tokenizer.normalizer = Lowercase()
    ending: dict[str, Any] = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
        **ending,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _pieces(special: list[str]) -> dict[str, int]:
    tokenizer = Tokenizer(WordPiece(unk_token=special[1]))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES * 4, WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    return tokenizer.get_vocab()


def _save(model: Any, processor: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():  # the library's own start is so small that all vectors are nearly alike
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def clip_tokeniser() -> Any:
    vocab, merges = _bytes_bpe(["<|startoftext|>", "<|endoftext|>"], "</w>")
    return hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=20)


def make_clip(folder: Path, *, image_size: int = 30, patch: int = 6, **processing: Any) -> Path:
    torch.manual_seed(1)
    tokeniser = clip_tokeniser()
    ids: dict[str, Any] = {"bos_token_id": tokeniser.bos_token_id, "eos_token_id": tokeniser.eos_token_id}
    text = hf.CLIPTextConfig(**SMALL, **ids, vocab_size=len(tokeniser), max_position_embeddings=20, pad_token_id=1)
    vision = hf.CLIPVisionConfig(**SMALL, image_size=image_size, patch_size=patch)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    pictures = hf.CLIPImageProcessorPil(
        **{
            "size": {"shortest_edge": image_size},
            "crop_size": {"height": image_size, "width": image_size},
        }
        | processing
    )
    return _save(model, hf.CLIPProcessor(pictures, tokeniser), folder)


def make_siglip(folder: Path, *, second: bool, image_size: int = 27, patch: int = 6, **processing: Any) -> Path:
    torch.manual_seed(2)
    tokeniser = siglip2_tokeniser() if second else siglip_tokeniser(folder)
    text = hf.SiglipTextConfig(
        **SMALL, vocab_size=len(tokeniser), max_position_embeddings=16, projection_size=32, pad_token_id=1
    )
    vision = hf.SiglipVisionConfig(**SMALL, image_size=image_size, patch_size=patch)
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    size = {"height": image_size, "width": image_size}
    pictures = hf.SiglipImageProcessorPil(**{"size": size} | processing)
    return _save(model, hf.SiglipProcessor(pictures, tokeniser), folder)


def siglip_tokeniser(folder: Path) -> Any:
    """Return SigLIP's own tokeniser; the fast form of it, which checkpoints carry too, goes into the folder."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence.lower() for sentence in SENTENCES * 20]),
        model_writer=model,
        vocab_size=50,
        pad_id=-1,
        unk_id=2,
        bos_id=-1,
        eos_id=1,
        user_defined_symbols=["<extra>"],
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(read.id_to_piece(at), read.get_score(at)) for at in range(read.get_piece_size())]
    fast = hf.T5Tokenizer(vocab=vocab, extra_ids=0, pad_token="</s>")
    (folder / "tokenizer.json").write_text(fast.backend_tokenizer.to_str())
    return hf.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)


def siglip2_tokeniser() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    letters = sorted({letter for sentence in SENTENCES for letter in sentence.lower().replace(" ", "▁")})
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=420, special_tokens=[*special, *raw], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([sentence.lower().replace(" ", "▁") for sentence in SENTENCES * 4], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = hf.Siglip2Tokenizer(vocab=model["vocab"], merges=merges, padding_side="right", model_max_length=16)
    backend = made.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", model["vocab"]["<eos>"])])
    return made


def roberta_tokeniser() -> Any:
    vocab, merges = _bytes_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return hf.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=40)


def make_clap(folder: Path, *, fused: bool, **processing: Any) -> Path:
    torch.manual_seed(3)
    tokeniser = roberta_tokeniser()
    text = hf.ClapTextConfig(
        **SMALL, vocab_size=len(tokeniser), max_position_embeddings=50, projection_dim=24, pad_token_id=1
    )
    audio = hf.ClapAudioConfig(
        window_size=4,
        spec_size=128 if fused else 64,
        patch_size=4,
        patch_stride=[4, 4],
        num_mel_bins=64 if fused else 16,
        hidden_size=32,
        patch_embeds_hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        projection_dim=24,
        enable_fusion=fused,
        fusion_type="aff_2d" if fused else None,
    )
    config = hf.ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=24)
    model = hf.ClapModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as measured on decibels
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.fill_(-40.0)
            module.running_var.fill_(300.0)
    sounds = hf.ClapFeatureExtractor(
        **{
            "feature_size": 64 if fused else 16,
            "sampling_rate": 8000,
            "hop_length": 80,
            "max_length_s": 1,
            "fft_window_size": 256,
            "frequency_min": 50,
            "frequency_max": 3500,
            "truncation": "fusion" if fused else "rand_trunc",
        }
        | processing
    )
    return _save(model, hf.ClapProcessor(sounds, tokeniser), folder)


def make_sentences(
    folder: Path,
    *,
    family: str = "bert",
    pooling: str = "mean",
    unit: bool = True,
    modern: bool = False,
    limit: int = 24,
) -> Path:
    """Write a sentence-transformers folder, in the words of its versions up to 5 or (`modern`) from 6 on."""
    torch.manual_seed(4)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    match family:
        case "bert":
            tokeniser: Any = hf.BertTokenizer(vocab=_pieces(special))
            model: Any = hf.BertModel(hf.BertConfig(**SMALL, vocab_size=len(tokeniser), max_position_embeddings=64))
        case "distilbert":
            tokeniser = hf.BertTokenizer(vocab=_pieces(special))
            config = hf.DistilBertConfig(vocab_size=len(tokeniser), dim=32, hidden_dim=48, n_layers=2, n_heads=4)
            model = hf.DistilBertModel(config)
        case "mpnet":
            vocab = _pieces(["<s>", "[UNK]", "<pad>", "</s>", "<mask>", "<unk>"])
            vocab["<pad>"], vocab["[UNK]"] = vocab["[UNK]"], vocab["<pad>"]
            tokeniser = hf.MPNetTokenizer(vocab=vocab)
            ids: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 3}
            model = hf.MPNetModel(hf.MPNetConfig(**SMALL, **ids, vocab_size=len(tokeniser), max_position_embeddings=64))
        case _:
            tokeniser = roberta_tokeniser()
            model = hf.RobertaModel(
                hf.RobertaConfig(**SMALL, vocab_size=len(tokeniser), max_position_embeddings=64, pad_token_id=1)
            )
    _save(model, tokeniser, folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if unit else [])]
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{kind}" if at else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    about: dict[str, Any] = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    about["word_embedding_dimension"] = 32
    if modern:
        about = {"embedding_dimension": 32, "pooling_mode": pooling, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(about))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    return folder
