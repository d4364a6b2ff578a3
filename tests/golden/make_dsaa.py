"""Write dsaa.safetensors: the reference's projectors and a tiny two-tower model, its losses and its greedy generation.

    PYTHONPATH=CHECKOUT python tests/golden/make_dsaa.py

CHECKOUT is the tree of slavivo/dsaa at 112daef. Environment: torch 2.13.0, transformers 4.57.6, numpy, safetensors,
einops, sentencepiece, huggingface_hub. The reference fixes the projectors' widths at those of Moshi 7B; the names that
it calls are bound to ours here. Holds `weights/NAME` (official names), `llm/NAME` (transformers' Qwen2 names), `KIND/...`
for each projector, inputs and outputs. Read by test_dsaa.py.
"""

import json
import os
from pathlib import Path

os.environ |= {"NO_TORCH_COMPILE": "1", "NO_CUDA_GRAPH": "1", "HF_HUB_OFFLINE": "1"}

import modules
import moshi.models.lm as lm
import torch
from finetune.loss import compute_loss_with_mask
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
DT, DA, DD, H, V, CARD = 12, 24, 10, 7, 43, 13
QWEN = {"vocab_size": V, "hidden_size": DT, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
MOSHI = {"dim": DA, "text_card": 32, "n_q": 5, "dep_q": 3, "card": CARD, "num_heads": 3, "num_layers": 2, "hidden_scale": 4.125,
         "causal": True, "context": 40, "max_period": 10000, "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope",
         "depformer_dim": DD, "depformer_dim_feedforward": 41, "depformer_num_heads": 1, "depformer_num_layers": 2,
         "depformer_multi_linear": True, "depformer_context": 3, "depformer_max_period": 10000, "depformer_gating": "silu",
         "depformer_pos_emb": "none", "depformer_weights_per_step": True, "delays": [0, 0, 1, 2, 0, 1],
         "existing_text_padding_id": 5, "existing_text_end_padding_id": 5, "existing_bos_id": 7}


@torch.no_grad()
def scramble(model, seed):
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        one = name.endswith("alpha") or (p.dim() == 1 and name.endswith("weight"))
        p.copy_(1 + 0.3 * noise if one else 0.3 * noise if p.dim() < 2 or "emb" in name else 0.8 * p.shape[-1] ** -0.5 * noise)
    return model.eval()


def projectors(out):
    made = {"mlp": modules.MLPProjector(12, 9, 5), "residual": modules.ResidualProjector(12, 9, 5),
            "gated": modules.GatedProjector(12, 9, 5), "preserve": modules.TextPreservingProjector(7, 5, 9, 7),
            "text_residual": modules.TextResidualProjector(7, 5, 9, 7)}
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3)) * 3
    out["projector_x"] = x
    for n, (kind, model) in enumerate(made.items()):
        scramble(model, n)
        out |= {f"{kind}/{name}": t.detach().clone() for name, t in model.state_dict().items()}
        out[f"{kind}/y"] = model(x).detach()


def main():
    out = {}
    projectors(out)
    llm = scramble(Qwen2ForCausalLM(Qwen2Config(**QWEN, output_hidden_states=True, attn_implementation="eager")), 10)
    out |= {f"llm/{name}": t.detach().clone() for name, t in llm.state_dict().items()}
    lm.TextPreservingProjector = lambda *_: modules.TextPreservingProjector(DT, DA, H, DT)
    lm.ResidualProjector = lambda *_: modules.ResidualProjector(DT + DA + DD, H, DD)
    kept = {name: p.detach().clone() for name, p in llm.named_parameters()}
    model = lm.TextLMModel(text_llm=llm, device="cpu", dtype=torch.float32, **MOSHI)
    scramble(model, 11)
    with torch.no_grad():                                   # the language model came along: put its weights back
        for name, p in llm.named_parameters():
            p.copy_(kept[name.replace("embed_tokens.emb.", "embed_tokens.")])
    out |= {f"weights/{name}": t.detach().clone() for name, t in model.state_dict().items()}
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(0, CARD, (2, 6, 9), generator=g)
    codes[:, 0] = torch.randint(8, V, (2, 9), generator=g)
    codes[0, 0, 2:5], codes[:, :, 8], codes[1, 0, 3] = 5, -1, -1
    with torch.no_grad():
        found = model(codes=codes)
    out |= {"codes": codes, "logits": found.logits.nan_to_num(), "mask": found.mask, "text_logits": found.text_logits.nan_to_num(),
            "text_mask": found.text_mask}
    out["text_loss"] = compute_loss_with_mask(found.text_logits, codes[:, :1], found.text_mask, "text", text_padding_weight=0.5,
                                              text_padding_ids={5})
    out["audio_loss"] = compute_loss_with_mask(found.logits, codes[:, 1:4], found.mask, "audio", first_codebook_weight_multiplier=100.0)
    user = torch.randint(0, CARD, (1, 2, 12), generator=g)
    generator, steps = lm.LMGen(model, use_sampling=False, temp=0.0, temp_text=0.0), []
    with torch.no_grad(), generator.streaming(1):
        for t in range(user.shape[2]):
            column = generator.step(user[:, :, t : t + 1])
            if column is not None:
                steps.append(column[..., 0])
    out |= {"user": user, "generated": torch.stack(steps, -1)}
    about = {**MOSHI, "text_llm": QWEN}
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "dsaa.safetensors", metadata={
        "format": "pt", "config": json.dumps(about), "command": "python tests/golden/make_dsaa.py", "reference": "slavivo/dsaa 112daef"})
    print((HERE / "dsaa.safetensors").stat().st_size, "bytes", {k: tuple(v.shape) for k, v in out.items() if "/" not in k})


if __name__ == "__main__":
    main()
