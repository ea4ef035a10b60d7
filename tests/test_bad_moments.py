"""Threads, inference mode and passes that fail half-way: what comes after them is right, as it is with LoRA."""

import sys
import threading
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_gradients,
    dense_of,
    is_smt,
    make_config,
    outputs,
    train,
    wrap,
)
from peft import PeftModel

pytestmark = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def base(llama):
    """Never wrapped, in float64."""
    return llama.double()


@pytest.fixture
def saved(base, batches, method, tmp_path):
    """A folder with a trained adapter, and the model that it was saved from."""
    model = wrap(base, method, seed=3)
    train(model, batches)
    model.float().double()  # what a file holds
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def load(base, folder, **options) -> PeftModel:
    return PeftModel.from_pretrained(deepcopy(base), folder, **options)


# --- inference mode ----------------------------------------------------------------------------------------------


def test_a_forward_in_inference_mode_does_not_spoil_training(base, batches, method):
    model = wrap(base, method)
    with torch.inference_mode():
        model.eval()(batches[0]["input_ids"])
    assert_right(model, base, batches[0])
    train(model, batches)
    with torch.inference_mode():
        found = model.eval()(batches[0]["input_ids"]).logits
    assert_close(found.clone(), outputs(dense_of(base, model), batches[0]))
    assert_right(model, base, batches[1])


def test_an_adapter_loaded_in_inference_mode_beside_one_that_is_trained(base, batches, saved, method):
    model = wrap(base, method)
    with torch.inference_mode():
        model.load_adapter(saved[0], "loaded")
        model.eval()(batches[0]["input_ids"])
    assert_right(model, base, batches[0])
    with torch.inference_mode():
        model.set_adapter("loaded", inference_mode=True)
    assert_close(outputs(model, batches[0]), outputs(saved[1], batches[0]))


def test_an_adapter_that_inference_mode_made_is_right_and_not_trained(base, batches, saved, method):
    """PyTorch gives tensors of inference mode no gradient outside of it; LoRA fails there, too."""
    with torch.inference_mode():
        model = load(base, saved[0], is_trainable=True)
    with torch.no_grad():
        found = model.eval()(batches[0]["input_ids"]).logits
    assert_close(found, outputs(saved[1], batches[0]))
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved|does not require grad"):
        model.train()(**batches[0]).loss.backward()


@pytest.mark.parametrize("where", ["the base", "both"])
def test_a_base_made_in_inference_mode_can_be_used(base, batches, saved, method, where):
    with torch.inference_mode():
        model = deepcopy(base)
        model = PeftModel.from_pretrained(model, saved[0]) if where == "both" else model
    if where == "the base":
        model = PeftModel.from_pretrained(model, saved[0])
    expected = outputs(saved[1], batches[0])
    assert_close(outputs(model, batches[0]), expected)
    with torch.inference_mode():
        assert_close(model(batches[0]["input_ids"]).logits, expected)


# --- threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def restless():
    """Switch threads as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_together(*functions):
    """Run the functions at once, one thread each, started together; returns their results."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(place, function):
        barrier.wait()
        try:
            results[place] = function()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [result for result in results if isinstance(result, Exception)]
    if failed:
        raise failed[0]
    return results


def test_eight_threads_meet_on_a_freshly_loaded_adapter(base, saved, restless, method):
    requests = list(torch.randint(2, 64, (8, 1, 6), generator=torch.Generator().manual_seed(4)))
    expected = [outputs(saved[1], {"input_ids": request}) for request in requests]
    for _ in range(4):
        model = load(base, saved[0]).eval()

        def answer(request, model=model):
            with torch.no_grad():
                return model(request).logits

        found = run_together(*[lambda request=request: answer(request) for request in requests])
        for mine, wanted in zip(found, expected, strict=True):
            assert_close(mine, wanted)


def test_one_thread_trains_while_another_evaluates(base, batches, restless, method):
    model = wrap(base, method)
    dense, expected = dense_of(base, model), outputs(model, batches[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    dense(**batches[0]).loss.backward()

    def training():
        found = []
        for _ in range(8):
            found.append(torch.autograd.grad(model(**batches[0]).loss, trained))
        return found

    def evaluating():
        with torch.no_grad():
            return [model(batches[1]["input_ids"]).logits for _ in range(16)]

    gradients, logits = run_together(training, evaluating)
    for found in gradients:
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.grad = gradient
        assert_same_gradients(model, dense)
    for found in logits:
        assert_close(found, expected)


# --- what fails half-way -------------------------------------------------------------------------------------------


class Stumbles:
    """Raises in the forward or in the backward behind the first layer's output, as long as it is switched on."""

    def __init__(self, model, where, error=RuntimeError):
        self.on, self.where, self.error = True, where, error
        root = model.base_model.model
        root.model.layers[0].register_forward_hook(self.watch)

    def watch(self, module, args, output):
        if self.where == "forward":
            self.stumble()
        elif output.requires_grad:
            output.register_hook(self.stumble)

    def stumble(self, gradient=None):
        if self.on:
            raise self.error("stumbled")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["off", "non-reentrant"])
def test_a_pass_that_fails_half_way_leaves_nothing_behind(base, batches, method, where, error, mode):
    model = wrap(base, method)
    if mode != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stumbling = Stumbles(model, where, error)
    for _ in range(2):
        with pytest.raises(error, match="stumbled"):
            model(**batches[1]).loss.backward()
    stumbling.on = False
    assert_right(model, base, batches[0])
    assert_right(model, base, batches[1])


def test_a_backward_that_failed_is_repeated_on_the_graph_that_was_kept(base, batches, method):
    model = wrap(base, method)
    dense, stumbling = dense_of(base, model), Stumbles(model, "backward")
    loss = model(**batches[0]).loss
    with pytest.raises(RuntimeError, match="stumbled"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    stumbling.on = False
    loss.backward(retain_graph=True)
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)
    loss.backward()
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)


def test_what_a_failed_backward_left_in_grad_is_all_that_zero_grad_clears(base, batches, method):
    """Without zero_grad the next backward adds to what is in .grad, and to nothing else."""
    model = wrap(base, method)
    dense, stumbling = dense_of(base, model), Stumbles(model, "backward")
    with pytest.raises(RuntimeError, match="stumbled"):
        model(**batches[1]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    left = [None if p.grad is None else p.grad.clone() for p in trained]
    stumbling.on = False
    model(**batches[0]).loss.backward()
    for parameter, before in zip(trained, left, strict=True):
        if before is not None:
            parameter.grad -= before
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)


def test_a_mixed_batch_that_fails_leaves_plain_forwards_right(base, batches, method):
    if method == "lora":
        pytest.skip("its hooks stay after an error")
    model = wrap(base, method)
    add_adapter(model, "other", seed=7, target_modules=["v_proj", "o_proj"])
    stumbling = Stumbles(model, "forward", KeyError)
    with pytest.raises(KeyError, match="stumbled"), torch.no_grad():
        model.eval()(batches[0]["input_ids"], adapter_names=["other", "__base__"])
    stumbling.on = False
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        assert_right(model, base, batches[0], adapter)


def test_an_adapter_that_replaces_the_last_one_survives_an_interrupted_backward(base, batches, method):
    model = wrap(base, method)
    train(model, batches, steps=1)
    model.delete_adapter("default")
    model.add_adapter("fresh", make_config(method, target_modules=["q_proj", "down_proj"], seed=9))
    model.double().set_adapter("fresh")
    stumbling = Stumbles(model, "backward", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match="stumbled"):
        model.train()(**batches[0]).loss.backward()
    stumbling.on = False
    assert_right(model, base, batches[0], "fresh")
    if is_smt(model):
        assert_base_untouched(model, base)
    assert not any(".default." in key for key in model.state_dict())
