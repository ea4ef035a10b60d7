"""SMT inside transformers' Trainer: the warm-up callback, and resuming bit for bit."""

import random
from collections import defaultdict, deque
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from interrupt import each_interrupt, explained_by
from peft import PeftModel, get_peft_model
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from smt_peft import Selection, SMTConfig, SMTMonitorCallback, SMTWarmupCallback, callback, select_blocks, untouched
from smt_peft.callback import _refuse_what_is_read_once
from smt_peft.layer import Linear
from smt_peft.untouched import same_order_afterwards
from smt_peft.writing import written_whole

STEPS, WARMUP_STEPS = 6, 3


class Sentences(Dataset):
    """Random tokens; counts what is read, and can fail at one reading as a machine would."""

    def __init__(self):
        self.tokens = torch.randint(2, 64, (16, 8), generator=torch.Generator().manual_seed(1))
        self.read: list[int] = []
        self.fail_at: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.read.append(i)
        if len(self.read) == self.fail_at:
            raise KeyboardInterrupt
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class Recorder(TrainerCallback):
    """Remembers what the bank held after every step, and can stop the run as an interruption would."""

    def __init__(self, stop_after: int | None = None):
        self.banks, self.stop_after = [], stop_after

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.banks.append(model.base_model.model.smt_bank["default"].weight.detach().clone())
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def base(make_llama):
    """With dropout, so that a run depends on the random state."""
    return make_llama(attention_dropout=0.2)


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, *callbacks, data=None, eval_dataset=None, warm_up=WARMUP_STEPS, **options) -> Trainer:
        if not hasattr(model, "peft_config"):
            model = get_peft_model(
                model, SMTConfig(block_size=16, num_blocks=12, warmup_steps=warm_up or WARMUP_STEPS)
            )
        defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "save_steps": 2}
        args = TrainingArguments(str(tmp_path / "run"), **{**defaults, **quiet, **options})
        callbacks = [*callbacks, *([SMTWarmupCallback()] if warm_up else [])]
        return Trainer(model, args, None, data or Sentences(), eval_dataset, callbacks=callbacks)

    return make


def bank(trainer):
    return trainer.model.base_model.model.smt_bank["default"]


def selection_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SMTWarmupCallback)).selection


def assert_same_result(trainer, other):
    assert torch.equal(bank(trainer).index, bank(other).index)
    assert torch.equal(bank(trainer).weight, bank(other).weight)


def test_the_callback_selects_and_the_trainer_trains_the_selected_blocks(base, make_trainer):
    before = deepcopy(base).state_dict()
    trainer = make_trainer(base)
    trainer.train()
    selection = selection_of(trainer)
    assert selection.batches == WARMUP_STEPS and torch.equal(selection.index, bank(trainer).index)
    assert (bank(trainer).weight.abs().amax((1, 2)) > 0).all(), "every selected block has moved"
    unloaded = trainer.model.unload().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in unloaded.items())


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}], ids=["plain loss", "label smoothing"])
def test_scores_are_those_of_the_trainers_loss(make_llama, make_trainer, options):
    base, data = make_llama(), Sentences()
    dense = deepcopy(base).train()
    trainer = make_trainer(base, data=data, **options)
    trainer.train()
    selection, expected = selection_of(trainer), {}
    smooth = LabelSmoother(options.get("label_smoothing_factor", 0.0))
    for batch in torch.tensor(data.read[: 2 * WARMUP_STEPS]).view(-1, 2):
        tokens = data.tokens[batch]
        dense.zero_grad()
        smooth({"logits": dense(tokens).logits}, tokens, shift_labels=True).backward()
        for name in selection.names:
            blocks = dense.get_submodule(name).weight.grad.abs().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
            expected[name] = expected.get(name, 0) + blocks.mean((1, 3)) / WARMUP_STEPS
    for name, scores in zip(selection.names, selection.scores, strict=True):
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-9)


def test_a_trainer_that_counts_its_inputs_itself_counts_each_once(make_llama, make_trainer, monkeypatch):
    """TRL's GOLD counts there, GRPO in `training_step`, which no warm-up calls: both see one more each time."""
    for counts in (True, False):
        trainer, seen = make_trainer(make_llama(), warm_up=4, max_steps=1), []

        def prepare(inputs, trainer=trainer, seen=seen, counts=counts, original=trainer._prepare_inputs):
            seen.append(trainer._step)
            trainer._step += counts
            return original(inputs)

        trainer._step, trainer._prepare_inputs = 0, prepare
        trainer.train()
        assert seen[:4] == [0, 1, 2, 3] and trainer._step == counts  # as before the warm-up, and one step


@pytest.mark.parametrize("warm_up", [WARMUP_STEPS, 10])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_steps": 9}], ids=str)
def test_training_after_a_warm_up_is_training_without_one(base, make_trainer, options, warm_up):
    """Same batches in the same order, same dropout: only the blocks come from the warm-up. An epoch has 8 steps."""
    first = make_trainer(deepcopy(base), warm_up=warm_up, **options)
    first.train()
    given = first.model.peft_config["default"].selected_blocks
    model = get_peft_model(base, SMTConfig(block_size=16, selected_blocks=given))
    data = Sentences()
    second = make_trainer(model, data=data, warm_up=0, **options)
    second.train()
    skipped = len(first.train_dataset.read) - len(data.read)
    assert first.train_dataset.read[skipped:] == data.read and skipped >= 2 * warm_up
    assert_same_result(first, second)


def test_a_run_interrupted_after_some_steps_resumes_bit_for_bit(base, make_trainer):
    whole = make_trainer(deepcopy(base), whole_run := Recorder())
    whole.train()
    interrupted = make_trainer(deepcopy(base), Recorder(stop_after=3), save_strategy="steps")
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    data = Sentences()
    resumed = make_trainer(base, resumed_run := Recorder(), data=data)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert len(data.read) <= 2 * (STEPS + 1), "the checkpoint has its blocks: no second warm-up"
    assert_same_result(whole, resumed)
    assert resumed.model.peft_config["default"].selected_blocks == bank(whole).selected_blocks()
    assert all(torch.equal(a, b) for a, b in zip(whole_run.banks[2:], resumed_run.banks, strict=True))


def test_a_run_interrupted_in_the_warm_up_can_simply_start_again(base, make_trainer):
    whole = make_trainer(deepcopy(base))
    whole.train()
    data = Sentences()
    data.fail_at = 2 * WARMUP_STEPS
    interrupted = make_trainer(base, data=data)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert not bank(interrupted).is_selected
    again = make_trainer(interrupted.model)
    again.train()
    assert_same_result(whole, again)


def test_the_best_model_is_loaded_at_the_end(base, make_trainer):
    recorder = Recorder()
    early = {"load_best_model_at_end": True, "greater_is_better": True}  # the loss falls, so this prefers early steps
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    trainer = make_trainer(base, recorder, eval_dataset=Sentences(), **early, **steps)
    trainer.train()
    best = trainer.state.best_global_step
    assert best == 2
    assert torch.equal(bank(trainer).weight, recorder.banks[best - 1])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_loaded_adapter_skips_the_warm_up(base, make_trainer, tmp_path):
    first = make_trainer(deepcopy(base))
    first.train()
    first.model.save_pretrained(tmp_path / "adapter")
    again = make_trainer(PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True))
    again.train()
    assert selection_of(again).has_blocks(bank(first).selected_blocks())  # of the record beside the adapter
    assert len(again.train_dataset.read) <= 2 * (STEPS + 1)
    assert torch.equal(bank(first).index, bank(again).index)
    assert not torch.equal(bank(first).weight, bank(again).weight)


def test_the_selection_of_an_earlier_warm_up_takes_its_place(base, make_trainer):
    first = make_trainer(deepcopy(base))
    first.train()
    data, selection = Sentences(), selection_of(first)
    again = make_trainer(base, SMTWarmupCallback(selection=selection), data=data, warm_up=None)
    again.train()
    assert_same_result(first, again)
    assert selection_of(again) is selection and len(data.read) <= (STEPS + 1) * again.args.train_batch_size


def test_a_callback_warms_up_in_each_run_that_it_sees(make_llama, make_trainer):
    """As in folds and in a search of hyperparameters."""
    callback, other = SMTWarmupCallback(), Sentences()
    other.tokens = other.tokens.flip(0) // 2 + 1
    make_trainer(make_llama(), callback, warm_up=0, seed=3).train()
    again, fresh = make_trainer(make_llama(), callback, warm_up=0, data=other), make_trainer(make_llama(), data=other)
    first = callback.selection
    again.train()
    fresh.train()
    assert torch.equal(bank(again).index, bank(fresh).index) and callback.selection is not first
    assert not torch.equal(bank(again).index, first.index)


def test_a_given_selection_beside_other_blocks_is_refused(make_llama, make_trainer):
    trainer = make_trainer(make_llama())
    trainer.train()
    selection = selection_of(trainer)
    config = SMTConfig(block_size=16, num_blocks=12, selection="random")
    refused = make_trainer(get_peft_model(make_llama(), config), SMTWarmupCallback(selection=selection), warm_up=0)
    with pytest.raises(ValueError, match="'default' has other blocks already"):
        refused.train()
    same = get_peft_model(make_llama(), SMTConfig(selected_blocks=selection))
    make_trainer(same, SMTWarmupCallback(selection=selection), warm_up=0).train()


def test_the_record_of_the_warm_up_survives_resuming(make_llama, make_trainer, tmp_path):
    make_trainer(make_llama(), save_strategy="steps", save_total_limit=1, max_steps=2).train()
    trainer = make_trainer(make_llama(), save_strategy="steps", save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    assert last.name == f"checkpoint-{STEPS}"
    saved, kept = Selection.load(last), selection_of(trainer)
    assert saved.blocks() == kept.blocks() == trainer.model.peft_config["default"].selected_blocks
    assert saved.batches == WARMUP_STEPS and saved.rebudget(5)


def test_an_adapter_of_another_name_resumes_with_its_record(make_llama, make_trainer, tmp_path):
    def make(**options) -> Trainer:
        config = SMTConfig(block_size=16, num_blocks=12, warmup_steps=WARMUP_STEPS)
        model = get_peft_model(make_llama(), config, adapter_name="mine")
        callbacks = SMTWarmupCallback("mine"), SMTMonitorCallback("mine")
        return make_trainer(model, *callbacks, warm_up=0, lr_scheduler_type="constant", **options)

    whole = make()
    whole.train()
    make(max_steps=2, save_strategy="steps").train()
    resumed = make(save_strategy="steps", save_steps=STEPS)
    resumed.train(resume_from_checkpoint=True)
    banks = [trainer.model.base_model.model.smt_bank["mine"] for trainer in (whole, resumed)]
    assert torch.equal(banks[0].index, banks[1].index) and torch.equal(banks[0].weight, banks[1].weight)
    assert Selection.load(tmp_path / f"run/checkpoint-{STEPS}/mine").rebudget(5)


def test_a_checkpoint_of_an_adapter_of_another_name_is_refused(make_llama, make_trainer):
    config = SMTConfig(block_size=16, num_blocks=12, warmup_steps=WARMUP_STEPS)
    named = get_peft_model(make_llama(), config, adapter_name="mine")
    make_trainer(named, SMTWarmupCallback("mine"), warm_up=0, max_steps=2, save_strategy="steps").train()
    for selection in ("gradient", "random"):  # with blocks and without
        config = SMTConfig(block_size=16, num_blocks=12, warmup_steps=WARMUP_STEPS, selection=selection)
        trainer = make_trainer(get_peft_model(make_llama(), config), SMTWarmupCallback(), warm_up=0)
        with pytest.raises(ValueError, match=r"does not hold the adapter 'default', but mine.*adapter_name='mine'"):
            trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_default_adapter_resumes_under_another_name(make_llama, make_trainer):
    """As with LoRA: where there is one adapter in a checkpoint, Trainer loads it whatever it is called."""
    config = SMTConfig(block_size=16, num_blocks=12, warmup_steps=WARMUP_STEPS)
    first = make_trainer(
        get_peft_model(make_llama(), config), warm_up=WARMUP_STEPS, max_steps=2, save_strategy="steps"
    )
    first.train()
    named = make_trainer(
        get_peft_model(make_llama(), config, adapter_name="mine"), SMTWarmupCallback("mine"), warm_up=0
    )
    named.train(resume_from_checkpoint=True)
    found, expected = named.model.base_model.model.smt_bank["mine"], bank(first)
    assert torch.equal(found.index, expected.index) and not torch.equal(found.weight, expected.weight)
    assert selection_of(named).blocks() == selection_of(first).blocks()


def test_the_trainer_is_itself_again_whatever_interrupts_its_lending(base, make_trainer):
    files = [Path(untouched.__file__), Path(callback.__file__)]

    def lend(trainer) -> None:
        with callback._lent(trainer):
            trainer.extra, trainer.record = 1, [*trainer.record, 2]

    def make() -> Trainer:
        trainer = make_trainer(base)
        trainer.record = [1]
        made.append((trainer, dict(vars(trainer))))
        return trainer

    made = []
    for trainer, place in each_interrupt(files, make, lend):
        with explained_by(place):
            _, before = made[-1]
            assert vars(trainer) == before and trainer.record == [1]


@pytest.mark.parametrize("contents", [{1: 1, 2: 2}, {1, 2}, [1, 2]], ids=["dict", "set", "list"])
def test_a_record_lacks_nothing_while_it_is_refilled(contents):
    """An interrupt may fall into the last time."""
    more = {**contents, 3: 3} if isinstance(contents, dict) else type(contents)([*contents, 3])
    refill = partial(untouched.refill, contents=contents)
    for record, place in each_interrupt([Path(untouched.__file__)], partial(deepcopy, more), refill):
        with explained_by(place):
            assert {*contents} <= {*record}


def test_what_a_killed_save_left_in_a_checkpoint_does_not_stop_a_resume(make_llama, make_trainer, tmp_path):
    """Trainer takes each folder in a checkpoint that has an adapter's weights for one more adapter."""
    trainer = make_trainer(make_llama(), save_strategy="steps", max_steps=2)
    trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-2")
    saving = written_whole(checkpoint)
    PeftModel.save_pretrained.__wrapped__(trainer.model, str(saving.__enter__()))  # and then the process ends
    assert len(list(checkpoint.rglob("adapter_model.safetensors"))) == 2
    resumed = make_trainer(make_llama(), save_strategy="steps")
    assert resumed.train(resume_from_checkpoint=True).global_step == STEPS
    assert [*resumed.model.peft_config] == ["default"]


def test_a_given_record_survives_resuming_and_a_second_run(make_llama, make_trainer, tmp_path):
    first = make_trainer(make_llama())
    first.train()
    given = selection_of(first).rebudget(12)
    for resumed in (None, True):
        callback = SMTWarmupCallback(selection=given)
        trainer = make_trainer(make_llama(), callback, warm_up=0, save_strategy="steps", max_steps=4 if resumed else 2)
        trainer.train(resume_from_checkpoint=resumed)
        assert callback.selection is given
        assert Selection.load(max((tmp_path / "run").glob("checkpoint-*"))).blocks() == given.blocks()
    found = selection_of(first)
    first.train()
    assert selection_of(first) is found


def test_what_could_not_be_avoided_is_refused(make_llama, make_trainer, base):
    trainer = make_trainer(base)
    trainer.train()
    with pytest.raises(ValueError, match=r"avoid=\['first'\].*selection"):
        SMTWarmupCallback(selection=selection_of(trainer), avoid=["first"])
    model = get_peft_model(make_llama(), SMTConfig(block_size=16, num_blocks=12, selection="random"))
    with pytest.raises(ValueError, match=r"avoid=\['first'\].*selection='random'"):
        make_trainer(model, SMTWarmupCallback(avoid=["first"]), warm_up=0).train()


def test_a_selection_that_was_given_is_saved_beside_the_adapter(make_llama, make_trainer, tmp_path):
    trainer = make_trainer(make_llama())
    trainer.train()
    selection = selection_of(trainer).rebudget(7)
    get_peft_model(make_llama(), SMTConfig(selected_blocks=selection)).save_pretrained(tmp_path)
    assert Selection.load(tmp_path).blocks() == selection.blocks()


class Once(IterableDataset):
    """A stream that goes on where it was."""

    def __init__(self):
        rows = Sentences()
        self.rows = iter([rows[i] for i in range(16)] * 4)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class Stored(IterableDataset):
    """The same, with an iterator that it keeps."""

    def __init__(self):
        self.rows = Once().rows

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("kind", [Once, Stored])
def test_data_that_can_be_read_only_once_is_refused_before_the_warm_up(base, make_trainer, kind):
    data = kind()
    with pytest.raises(ValueError, match="read only once: the warm-up would use up its first batches"):
        make_trainer(base, data=data).train()
    with pytest.raises(ValueError, match="read only once"):  # as accelerate gives each of several processes its part
        _refuse_what_is_read_once(DataLoader(IterableDatasetShard(data)))
    assert len(list(data.rows)) == 64, "nothing has been read"


def test_a_sampler_with_a_generator_of_its_own_gives_the_batches_of_a_run_without_warm_up(make_llama, make_trainer):
    read = []
    for warm_up in (WARMUP_STEPS, 0):
        data = Sentences()
        model = make_llama()
        if not warm_up:
            model = get_peft_model(model, SMTConfig(block_size=16, num_blocks=12, selection="random"))
        trainer = make_trainer(model, data=data, warm_up=warm_up)
        sampler = WeightedRandomSampler(torch.ones(16), 16, generator=torch.Generator().manual_seed(5))
        trainer._get_train_sampler = lambda *_, sampler=sampler: sampler
        trainer.train()
        read.append(data.read[-2 * STEPS :])
    assert read[0] == read[1]


def test_what_a_loss_logs_in_the_warm_up_is_in_no_log(base, make_trainer, monkeypatch):
    original = Trainer.compute_loss

    def logging(trainer, *args, **kwargs):
        trainer.log({"extra": 1.0})
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", logging)
    trainer = make_trainer(base)
    trainer.train()
    assert sum("extra" in entry for entry in trainer.state.log_history) == STEPS


class Masking:
    """A collator that makes its generator with the first batch, as transformers' for masked language models."""

    generator = None

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(5)
        return torch.rand(2, generator=self.generator)


class Drawing(IterableDataset):
    """A stream in an order of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        numpys = isinstance(self.generator, numpy.random.Generator)
        draw = self.generator.random if numpys else lambda n: torch.rand(n, generator=self.generator)
        return iter([draw(2)])


class Shuffling:
    """A sampler with a generator of its own, by a name of its own."""

    def __init__(self):
        self.rng = random.Random(5)

    def __iter__(self):
        return iter(self.rng.sample(range(16), 16))

    def __len__(self):
        return 16


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(range(16), collate_fn=Masking()),
        lambda: DataLoader(Drawing(torch.Generator().manual_seed(5))),
        lambda: DataLoader(IterableDatasetShard(Drawing(numpy.random.default_rng(5)))),
        lambda: DataLoader(range(16), sampler=Shuffling()),
        lambda: DataLoader(range(16), sampler=Old()),
        lambda: DataLoader(range(16), sampler=Counting()),
        lambda: DataLoader(range(16), sampler=Shuffling(), collate_fn=list),
    ],
    ids=["collator", "stream", "NumPy's in a shard", "Python's", "NumPy's old", "a counter", "a class"],
)
def test_generators_of_collators_and_streams_go_back(make):
    def draw(data) -> list:
        return torch.as_tensor(next(iter(data))).tolist()

    data = make()
    with same_order_afterwards(data):
        draw(data)
        draw(data)
    assert draw(data) == draw(make()) != draw(data)


class Counting:
    """A sampler that shuffles by how often it was asked."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(random.Random(self.epoch).sample(range(16), 16))

    def __len__(self):
        return 16


class Old(Shuffling):
    """One that draws by NumPy's legacy generators."""

    def __init__(self):
        self.rng = numpy.random.RandomState(5)

    def __iter__(self):
        return iter(self.rng.permutation(16).tolist())


def test_data_that_count_what_they_have_read_go_on_counting():
    """Together with what they keep of it."""

    class Lazy:
        def __init__(self):
            self.loaded, self.rows = 0, []

        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i >= self.loaded:
                self.rows.append(i)
                self.loaded += 1
            return self.rows[i]

    data = DataLoader(Lazy())
    with same_order_afterwards(data):
        next(iter(data))
    assert data.dataset.loaded == len(data.dataset.rows) == 1


def test_what_has_no_state_is_left_alone():
    with same_order_afterwards(SimpleNamespace(rng=random.SystemRandom())) as nothing:
        assert nothing is None


def test_looking_whether_data_begin_anew_draws_no_random_numbers():
    class Shuffled(IterableDataset):
        def __iter__(self):
            return iter(torch.randperm(9).tolist() + random.sample(range(9), 9))

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    _refuse_what_is_read_once(DataLoader(Shuffled()))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_a_loader_that_is_its_own_iterator_is_refused():
    with pytest.raises(ValueError, match="read only once"):
        _refuse_what_is_read_once(iter([{"input_ids": [1]}]))


def test_half_precision_without_a_scaler_of_the_trainer_has_a_loss_scale(base, monkeypatch):
    """DeepSpeed scales by itself."""
    model = get_peft_model(base, SMTConfig(block_size=16, num_blocks=12))
    monkeypatch.setattr(callback, "select_blocks", lambda *_, loss_scale, **__: pytest.fail(f"scale {loss_scale:.0f}"))
    args = SimpleNamespace(fp16=True, deepspeed_plugin=object(), disable_tqdm=True)
    with pytest.raises(pytest.fail.Exception, match="scale 65536"):
        SMTWarmupCallback().on_train_begin(args, TrainerState(), None, model=model, train_dataloader=[{}])


def test_what_a_loss_of_ones_own_appends_to_has_no_trace_of_the_warm_up(base, make_trainer):
    """Nor a part in it that comes by way of a hook, which holds the Trainer's own containers."""
    trainer = make_trainer(base)
    trainer.parts, trainer.features, compute = defaultdict(list), {}, type(trainer).compute_loss
    features = trainer.features
    trainer.model.get_input_embeddings().register_forward_hook(lambda *of: features.update(last=of[2].sum().item()))

    class Noting(type(trainer)):
        def compute_loss(self, model, inputs, **options):
            loss = compute(self, model, inputs, **options)
            self.parts["seen"].append(self.features["last"])
            return loss

    trainer.__class__ = Noting
    trainer.train()
    assert len(trainer.parts["seen"]) == STEPS and trainer.features is features


def test_records_of_the_trainer_stay_the_objects_that_others_hold(base, make_trainer):
    """An optimizer holds the weights of losses, a hook a part of a record."""
    trainer = make_trainer(base)
    weight, seen = torch.nn.Parameter(torch.tensor(1.0)), []
    trainer.losses, trainer.parts, compute = {"a": weight}, {"seen": seen}, type(trainer).compute_loss
    trainer.last = [(weight * 2)]  # not detached
    trainer.sums = {"a": numpy.zeros(())}

    class Weighing(type(trainer)):
        def compute_loss(self, model, inputs, **options):
            seen.append(1)
            self.sums["a"] += 1
            self.last[0] = compute(self, model, inputs, **options) * self.losses["a"]
            return self.last[0]

    trainer.__class__ = Weighing
    trainer.create_optimizer()
    trainer.optimizer.add_param_group({"params": [weight], "lr": 0.1})
    trainer.train()
    assert trainer.parts["seen"] is seen and len(seen) == STEPS
    assert trainer.losses["a"] is weight and weight != 1 and trainer.sums["a"] == STEPS


class Meter(torch.nn.Module):
    """What a loss counts in, as a module or as a plain object."""

    def __init__(self):
        super().__init__()
        self.count, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))

    def update(self):
        self.count += 1
        self.seen.append(1)
        self.total += 1


def test_what_a_loss_counts_in_has_no_trace_of_the_warm_up(base, make_trainer):
    trainer, compute = make_trainer(base), Trainer.compute_loss
    trainer.criterion, trainer.meter = Meter(), SimpleNamespace(count=0)
    trainer.part = trainer.model.get_base_model()  # which has the blocks

    class Counted(type(trainer)):
        def compute_loss(self, model, inputs, **options):
            self.criterion.update()
            self.meter.count += 1
            return compute(self, model, inputs, **options)

    trainer.__class__ = Counted
    trainer.train()
    assert trainer.criterion.count == trainer.meter.count == trainer.criterion.total == STEPS
    assert len(trainer.criterion.seen) == STEPS and bank(trainer).weight.any()


def test_a_loss_that_is_bound_to_the_trainer_leaves_no_trace_either(base, make_trainer):
    """Replaced on the instance, as those do who time it."""
    trainer = make_trainer(base)
    trainer.calls, compute = 0, trainer.compute_loss

    def counted(*args, **options):
        trainer.calls += 1
        trainer.log({"extra": 1.0})
        return compute(*args, **options)

    trainer.compute_loss = counted
    trainer.train()
    assert trainer.calls == sum("extra" in entry for entry in trainer.state.log_history) == STEPS
    assert vars(trainer)["compute_loss"] is counted and "log" not in vars(trainer)


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "is_record"),
    [
        ({"a": [1, 2.0, "x", None], "b": deque([torch.tensor(1.0)])}, True),
        ([], True),
        (5, False),
        ([{"input_ids": [1] * 20_000}], False),
        ([torch.zeros(2)], False),
        ({"a": Dataset()}, False),
        (ENDLESS, False),
    ],
    ids=["records", "nothing yet", "a number", "data", "tensors", "objects", "itself"],
)
def test_records_are_small_containers_of_plain_values(value, is_record):
    assert untouched.is_record(value) is is_record


def test_a_warm_up_by_hand_puts_the_order_of_the_data_back(base):
    data = DataLoader(range(8), shuffle=True, generator=torch.Generator().manual_seed(5))
    before = data.generator.get_state()
    model = get_peft_model(base, SMTConfig(block_size=16, num_blocks=12, warmup_steps=2))

    def loss(model, batch):
        return model(input_ids=batch[:, None] + 2).logits.square().mean()

    select_blocks(model, data, loss_function=loss, progress_bar=False)
    assert torch.equal(data.generator.get_state(), before)


def test_a_warm_up_by_hand_leaves_a_loader_its_workers(base):
    """One that keeps its workers asks them for another order the second time."""

    def loader():
        return DataLoader(range(16), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)

    def loss(model, batch):
        return model(input_ids=batch[:, None] + 2).logits.square().mean()

    model = get_peft_model(base, SMTConfig(block_size=16, num_blocks=12, warmup_steps=2))
    orders = []
    for warm_up in (False, True):
        data = loader()
        torch.manual_seed(0)
        if warm_up:
            select_blocks(model, data, loss_function=loss, progress_bar=False)
        orders.append(torch.cat(list(data)).tolist())
    assert orders[0] == orders[1]


def test_generators_of_samplers_go_back_wherever_they_are():
    """In one of several processes accelerate puts a layer around the batches."""
    sampler = WeightedRandomSampler(torch.ones(16), 16, generator=torch.Generator().manual_seed(5))
    data = DataLoader(range(16), batch_sampler=BatchSamplerShard(BatchSampler(sampler, 2, False), 2, 0))
    with same_order_afterwards(data):
        first = next(iter(data))
    assert torch.equal(first, next(iter(data)))


def test_the_summary_is_printed_once(base, make_trainer, capsys):
    make_trainer(base).train()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("SMT selected 12 blocks of 16 x 16") == 1


def test_a_second_adapter_gets_its_own_warm_up(base, make_trainer):
    first = make_trainer(base)
    first.train()
    model = first.model
    trained = bank(first).weight.detach().clone()
    model.add_adapter("second", SMTConfig(block_size=8, num_blocks=5, warmup_steps=WARMUP_STEPS))
    model.set_adapter("second")
    callback = SMTWarmupCallback("second")
    make_trainer(model, callback, warm_up=0).train()
    assert len(callback.selection.index) == 5
    assert torch.equal(bank(first).weight, trained), "the adapter that was not active stays as it was"
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert sum(int(layer.get_delta_weight("second").any()) for layer in layers) == len(callback.selection.blocks())


class Forwarding:
    """A loader of one's own around another, as distillation trainers have it."""

    def __init__(self, dataloader):
        self.dataloader = dataloader

    def __getattr__(self, name):
        return getattr(self.dataloader, name)

    def __iter__(self):
        return iter(self.dataloader)

    def __len__(self):
        return len(self.dataloader)


def test_a_loader_of_ones_own_is_warmed_up_on_and_left_as_it_is(base, make_trainer):
    plain = make_trainer(deepcopy(base))
    plain.train()
    trainer = make_trainer(base)
    loader = Forwarding(trainer.get_train_dataloader())
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    assert vars(loader).keys() == {"dataloader"}
    assert_same_result(trainer, plain)
