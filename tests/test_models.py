"""Common architectures: the defaults find q, k and v; training, saving, merging and unloading match dense truth."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from smt_peft import SMTConfig, select_blocks

VOCABULARY = 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
GQA = TEXT | {"num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPE = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "dropout": 0.0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
GPT2 |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
        (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))} | SHAPE | {"d_model": 32}  # fmt: skip
OPT = SHAPE | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_MOE |= {"shared_expert_intermediate_size": 16}

QKV, QKV_OF_BERT = {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}


def words(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two sequences of six tokens, with labels for every token."""
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    return {"input_ids": tokens, "labels": tokens} | extra


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


def causal(model: type, config: tf.PretrainedConfig, targets: set[str] = QKV, task: str | None = "CAUSAL_LM"):
    return SimpleNamespace(model=model, config=config, targets=targets, task=task, batch=words)


MODELS = {
    "llama": causal(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT)),
    "llama with grouped queries": causal(tf.LlamaForCausalLM, tf.LlamaConfig(**GQA)),
    "mistral": causal(tf.MistralForCausalLM, tf.MistralConfig(**GQA)),
    "qwen2": causal(tf.Qwen2ForCausalLM, tf.Qwen2Config(**GQA)),
    "qwen3 with bias": causal(tf.Qwen3ForCausalLM, tf.Qwen3Config(**GQA, head_dim=8, attention_bias=True)),
    "gemma3": causal(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GQA, head_dim=8)),
    "phi3": causal(tf.Phi3ForCausalLM, tf.Phi3Config(**GQA), {"qkv_proj"}),
    "gpt2": causal(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2), {"c_attn"}),
    "opt": causal(tf.OPTForCausalLM, tf.OPTConfig(**OPT)),
    "mixtral": causal(tf.MixtralForCausalLM, tf.MixtralConfig(**GQA, num_local_experts=3)),
    "qwen2 moe": causal(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig(**GQA, **QWEN_MOE)),
    "t5": causal(tf.T5ForConditionalGeneration, tf.T5Config(**T5), {"q", "k", "v"}, "SEQ_2_SEQ_LM"),
    "bart": causal(tf.BartForConditionalGeneration, tf.BartConfig(**BART), QKV, "SEQ_2_SEQ_LM"),
    "bert": SimpleNamespace(
        model=tf.BertForSequenceClassification,
        config=tf.BertConfig(**TEXT, **NO_DROPOUT),
        targets=QKV_OF_BERT,
        task="SEQ_CLS",
        batch=lambda: words(labels=torch.tensor([0, 1])),
    ),
    "roberta": SimpleNamespace(
        model=tf.RobertaForTokenClassification,
        config=tf.RobertaConfig(**TEXT, **NO_DROPOUT, num_labels=VOCABULARY),
        targets=QKV_OF_BERT,
        task="TOKEN_CLS",
        batch=words,
    ),
    "vit": SimpleNamespace(
        model=tf.ViTForImageClassification,
        config=tf.ViTConfig(**SIZES, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=3),
        targets=QKV | QKV_OF_BERT,  # by version of transformers
        task=None,
        batch=pictures,
    ),
}


class Trained:
    """One architecture: a random base model, and an adapter that was warmed up, trained and saved."""

    NUM_BLOCKS, WARMUP_STEPS = 7, 2

    def __init__(self, name: str, folder: Path):
        case = MODELS[name]
        torch.manual_seed(0)
        self.base = case.model(copy.deepcopy(case.config))
        self.batches = [case.batch() for _ in range(self.WARMUP_STEPS)]
        self.targets, self.task, self.folder = case.targets, case.task, folder
        self.model = get_peft_model(copy.deepcopy(self.base), self.config())
        self.selection = select_blocks(self.model, self.batches, progress_bar=False)
        self._train()
        self.logits = self.logits_of(self.model)
        self.model.save_pretrained(folder)

    def config(self) -> SMTConfig:
        budget = {"num_blocks": self.NUM_BLOCKS, "warmup_steps": self.WARMUP_STEPS, "block_size": 8}
        return SMTConfig(task_type=self.task, **budget)

    def _train(self, steps: int = 3) -> None:
        """Train a few steps; `first_gradient` and `losses` stay for the tests."""
        self.model.train()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.losses = []
        for step in range(steps):
            loss = self.model(**self.batches[0]).loss
            loss.backward()
            if step == 0:
                self.first_gradient = self.bank.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.item())

    @property
    def bank(self):
        return self.model.base_model.model.smt_bank["default"]

    @torch.no_grad()
    def logits_of(self, model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(**self.batches[0]).logits

    def dense_gradients(self, batch: dict) -> list[torch.Tensor]:
        """The gradient of every target's whole weight by plain autograd, as [out, in]."""
        model = copy.deepcopy(self.base).train()
        model(**batch).loss.backward()
        modules = [model.get_submodule(target.name) for target in self.bank.targets]
        return [m.weight.grad.T if isinstance(m, tf.pytorch_utils.Conv1D) else m.weight.grad for m in modules]


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp("adapter"))


def blocks_of(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[out, in] -> [block row, block column, size, size]."""
    return matrix.unfold(0, size, size).unfold(1, size, size)


def test_default_targets_are_every_query_key_and_value(trained):
    model = get_peft_model(copy.deepcopy(trained.base), SMTConfig())
    found = {target.name for target in model.base_model.model.smt_bank["default"].targets}
    attention = {name for name, _ in trained.base.named_modules() if name.rpartition(".")[2] in trained.targets}
    assert found == attention


@pytest.mark.parametrize("names", [sorted(QKV), ["q_proj", "v_proj"], ["qkv_proj", *sorted(QKV)]], ids=str)
def test_a_model_that_nobody_knows_is_asked_for_the_usual_names(names):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in [*names, "o_proj"]})
    if set(names) == QKV:
        adapted = get_peft_model(model, SMTConfig(block_size=16, num_blocks=3))
        assert {target.name for target in adapted.base_model.model.smt_bank["default"].targets} == set(names)
    else:
        with pytest.raises(ValueError, match="specify `target_modules`"):
            get_peft_model(model, SMTConfig(block_size=16, num_blocks=3))


def test_warm_up_selects_the_blocks_with_the_largest_dense_gradient(trained):
    scores = 0
    for batch in trained.batches:
        blocks = [blocks_of(gradient, 8).abs().mean((2, 3)) for gradient in trained.dense_gradients(batch)]
        scores = scores + torch.cat([block.flatten() for block in blocks])
    grids = [(target.rows, target.cols) for target in trained.bank.targets]
    place = [(t, row, col) for t, (rows, cols) in enumerate(grids) for row in range(rows) for col in range(cols)]
    best = {place[i] for i in scores.topk(trained.NUM_BLOCKS).indices}
    assert {tuple(block) for block in trained.selection.index.tolist()} == best


def test_block_gradients_equal_the_dense_gradient(trained):
    dense = trained.dense_gradients(trained.batches[0])
    expected = torch.stack([blocks_of(dense[t], 8)[row, col] for t, row, col in trained.selection.index.tolist()])
    torch.testing.assert_close(trained.first_gradient, expected, rtol=1e-4, atol=1e-7)


def test_training_lowers_the_loss(trained):
    assert trained.losses[-1] < trained.losses[0]


def test_a_loaded_adapter_gives_the_trained_logits(trained):
    loaded = PeftModel.from_pretrained(copy.deepcopy(trained.base), trained.folder)
    torch.testing.assert_close(trained.logits_of(loaded), trained.logits, rtol=0, atol=0)


def test_a_merged_model_is_a_plain_one_with_the_trained_logits(trained):
    merged = PeftModel.from_pretrained(copy.deepcopy(trained.base), trained.folder).merge_and_unload()
    assert set(merged.state_dict()) == set(trained.base.state_dict())
    torch.testing.assert_close(trained.logits_of(merged), trained.logits, rtol=1e-3, atol=1e-5)


def test_only_selected_blocks_of_the_merged_weights_differ_from_the_base(trained):
    merged = PeftModel.from_pretrained(copy.deepcopy(trained.base), trained.folder).merge_and_unload()
    before, changed = dict(trained.base.named_modules()), set()
    for position, target in enumerate(trained.bank.targets):
        difference = merged.get_submodule(target.name).weight - before[target.name].weight
        difference = difference.T if isinstance(before[target.name], tf.pytorch_utils.Conv1D) else difference
        changed |= {(position, *block) for block in blocks_of(difference, 8).any(3).any(2).nonzero().tolist()}
    assert changed == {tuple(block) for block in trained.selection.index.tolist()}


def test_unloading_gives_back_every_base_weight_bit_for_bit(trained):
    model = PeftModel.from_pretrained(copy.deepcopy(trained.base), trained.folder)
    trained.logits_of(model)
    unloaded = model.unload()
    after, before = unloaded.state_dict(), trained.base.state_dict()
    heads = getattr(model, "modules_to_save", None) or set()
    assert [n for n in before if not any(h in n for h in heads) and not torch.equal(after[n], before[n])] == []


@pytest.mark.parametrize(
    ("task", "model", "head"),
    [
        ("QUESTION_ANS", tf.BertForQuestionAnswering, "qa_outputs"),
        ("TOKEN_CLS", tf.BertForTokenClassification, "classifier"),
    ],
)
def test_the_new_head_of_a_task_is_trained_and_saved(task, model, head, tmp_path):
    config = SMTConfig(task_type=task, num_blocks=2, block_size=8, selection="random")
    adapted = get_peft_model(model(tf.BertConfig(**TEXT)), config)
    assert f"{head}.modules_to_save.default.weight" in {
        name.removeprefix("base_model.model.") for name, weight in adapted.named_parameters() if weight.requires_grad
    }
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(tf.BertConfig(**TEXT)), tmp_path)
    expected, found = (
        getattr(one.base_model.model, head).modules_to_save["default"].weight for one in (adapted, loaded)
    )
    assert torch.equal(found, expected)
