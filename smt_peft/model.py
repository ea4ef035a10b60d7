"""SMTModel: puts SMT layers into a model, gives the adapter its bank, and answers PEFT's calls about both."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    AuxiliaryTrainingWrapper,
    TrainableTokensWrapper,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft import bases, combining, states
from smt_peft.bank import DeltaBank, is_sharded
from smt_peft.banks import Banks, banks_of
from smt_peft.checks import BANK, FLOATS, Target
from smt_peft.config import SMTConfig
from smt_peft.experts import ParamWrapper
from smt_peft.given import given_index
from smt_peft.layer import Linear
from smt_peft.quantized import backend_of
from smt_peft.removal import layers_of, remove_banks, snapshot, take_out, take_out_of_wrappers
from smt_peft.targets import (
    choose_block_size,
    count_base_parameters,
    default_modules,
    is_in_wrapper,
    name_experts,
    name_linear_layers,
    share_budget,
)
from smt_peft.untouched import put_back_afterwards

# What PEFT adds to modules_to_save for these tasks, but only after the injection and to the user's config object.
HEADS = {TaskType.TOKEN_CLS: ["classifier", "score"], TaskType.QUESTION_ANS: ["qa_outputs"]}


class SMTModel(BaseTuner):
    """A model with Sparse Matrix Tuning adapters. Made by `get_peft_model(model, SMTConfig(...))`."""

    prefix = "smt_b"  # what the names of its modules in a model, smt_bank and smt_blocks, begin with
    tuner_layer_cls = Linear
    target_module_mapping = {}  # see `default_modules`

    # --- injection ---------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the targets and allocate the adapter's bank; on any error, leave the model as it was.

        An adapter that has this name already is replaced. The config is copied: what is resolved here (block size,
        budget, selection) must not leak into the next model that a user makes from the same config object.
        """
        if state_dict is not None:
            raise ValueError(
                "SMT takes its targets from the config, not from the names in a state_dict: leave it out, and load it "
                "afterwards by set_peft_model_state_dict."
            )
        _check_name(model, adapter_name)
        _check_rows(model, self.peft_config, adapter_name)
        undo, banks, replaced = snapshot(model), getattr(model, BANK, None), None
        targeted = [*self.targeted_module_names], [*self.targeted_parameter_names]
        for name, bank in (banks or {}).items():  # for TRL, which copies the config of the one that is there
            if name != adapter_name and name in self.peft_config:
                self.peft_config[name].selected_blocks = bank.selected_blocks()
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if config.task_type in HEADS:
            config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *HEADS[config.task_type]])]
        if not config.awaits_weights:
            name_experts(config, model)
        base_parameters = count_base_parameters(model)
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._shared = {parameter_id for parameter_id, count in uses.items() if count > 1}
        _check_tokens(config, model)
        if config.awaits_weights:
            config.trained_before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        try:
            if banks is None:
                setattr(model, BANK, Banks(model))
            elif adapter_name in banks:
                replaced = banks[adapter_name]
                take_out(model, adapter_name)
                take_out_of_wrappers(model, adapter_name)
            if config.target_modules is None:
                config.target_modules = default_modules(model, self.get_model_config(model)["model_type"])
            name_linear_layers(config, model)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            self._allocate_bank(model, adapter_name, base_parameters, low_cpu_mem_usage)
        except BaseException:
            if banks is None:
                remove_banks(model)
            for change_back in undo:
                change_back()
            self.targeted_module_names, self.targeted_parameter_names = targeted
            if replaced is not None:
                self.peft_config[adapter_name] = replaced.config
            raise

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, Linear) and parameter_name in (None, target.parameter_name):
            target.update_layer(adapter_name)
            return
        if is_in_wrapper(self.model, current_key):  # a part of what another adapter trains whole
            return
        if parameter_name is not None:
            self._wrap_parameter(adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        backend = backend_of(target, self)
        if not isinstance(target, (nn.Linear, Conv1D)) and getattr(backend, "layer_type", None) != "linear":
            raise TypeError(
                f"Target module {current_key} is a {type(target).__name__}; SMT trains blocks of torch.nn.Linear, "
                "transformers' Conv1D and their quantised forms. Narrow target_modules or use exclude_modules."
            )
        mesh = getattr(getattr(target, "weight", None), "device_mesh", None)
        if not set(getattr(mesh, "mesh_dim_names", None) or ()) <= {"fsdp", "dp_replicate"}:
            raise TypeError(
                f"Target module {current_key} is divided by tensor parallelism ({', '.join(mesh.mesh_dim_names)}); "
                "SMT does not train parts of blocks. Load the model without it."
            )
        is_shared = id(getattr(target, "weight", None)) in self._shared  # GPTQ's layers have no such parameter
        layer = Linear(target, getattr(self.model, BANK), is_shared, backend).train(target.training)
        layer.update_layer(adapter_name)
        self._replace_module(parent, target_name, layer, target)

    def _check_target_module_compatiblity(self, peft_config, model, target_name) -> None:
        """As PEFT does for LoRA: kernels of Mamba read some weights themselves, past their layer."""
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("LORA", "SMT")) from None

    def _wrap_parameter(self, adapter_name, target, target_name, parent, key, parameter_name) -> None:
        module = target.get_base_layer() if isinstance(target, ParamWrapper) else target
        weight = getattr(module, parameter_name)
        if weight.ndim < 2 or is_sharded(weight):
            what = "is sharded" if is_sharded(weight) else f"has the shape {tuple(weight.shape)}"
            raise TypeError(
                f"Target parameter {key} {what}; SMT trains blocks of whole parameters with two dimensions or more. "
                "Take it out of target_parameters; if target_modules named it, by 'all-linear' or by a "
                "name that experts once had, name other modules there."
            )
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"Target parameter {key} is of {str(weight.dtype).removeprefix('torch.')}, which is packed or too "
                "narrow to add deltas to; load the model in bfloat16, or take it out of target_parameters (which "
                "'all-linear' in target_modules adds to)."
            )
        layer = ParamWrapper(target, parameter_name, getattr(self.model, BANK), id(weight) in self._shared)
        layer.train(target.training).update_layer(adapter_name)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)  # PEFT's also hands `weight` over, which some modules lack
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new_module, Linear):
            new_module.register_forward_pre_hook(_as_it_is)  # in eval mode it takes weights past what has no hooks

    def _allocate_bank(self, model: nn.Module, adapter: str, base_parameters: int, on_meta: bool) -> None:
        config: SMTConfig = self.peft_config[adapter]
        banks: Banks = getattr(model, BANK)
        layers = {
            module.target_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, Linear) and adapter in module.smt_blocks
        }
        if not layers:
            raise ValueError(f"The targets of adapter {adapter!r} lie in modules that another one trains whole.")
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        size = config.block_size = choose_block_size(config, shapes)
        targets = [Target(name, rows // size, cols // size) for name, (rows, cols) in shapes.items()]
        groups = share_budget(config, targets, base_parameters)
        device = torch.device("meta") if on_meta else next(iter(layers.values())).device
        bank = DeltaBank(config, targets, groups, device)
        bank.base_parameters, bank.base = base_parameters, bases.sample(bases.base_weights(model, with_heads=False))
        active = adapter in self.active_adapters and not config.inference_mode
        bank.weight.requires_grad_(active)
        banks[adapter] = bank
        for position, layer in enumerate(layers.values()):
            layer.smt_blocks[adapter].target = position
        if not config.init_weights and not on_meta:
            nn.init.normal_(bank.weight, std=0.02)
        index = given_index(bank, list(layers.values()))
        if index is not None:
            bank.set_index(index)
            config.selected_blocks = bank.selected_blocks()

    # --- what PEFT finds inside layers for other methods, and at the model's root for this one ---------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        bank: DeltaBank = getattr(self.model, BANK)[adapter_name]
        if autocast_adapter_dtype and bank.weight.dtype in (torch.float16, torch.bfloat16):
            bank.weight = nn.Parameter(bank.weight.data.float(), requires_grad=bank.weight.requires_grad)

    def _unload_and_optionally_merge(self, merge: bool = True, **options) -> nn.Module:
        if not merge:
            for layer in layers_of(self.model):
                layer.restore()
            for wrapper in self.model.modules():
                if isinstance(wrapper, TrainableTokensWrapper) and wrapper.token_adapter.merged:
                    wrapper.token_adapter.unmerge()
        was_tied = self.get_model_config(self.model).get("tie_word_embeddings")
        model = super()._unload_and_optionally_merge(merge=merge, **options)
        # PEFT says of the whole model that nothing is tied any more. Where more is than head and embedding (BART's
        # encoder and decoder, BERT's biases), that would not be saved; stored weights that differ are not tied anyway.
        if was_tied and len(getattr(model, "all_tied_weights_keys", None) or ()) > 1:
            if not model.config.tie_word_embeddings:
                warnings.warn(
                    "config.tie_word_embeddings stays True, because more is tied in this model than its head: the "
                    "merged head is saved and loaded as it is, but tie_weights(), which resize_token_embeddings "
                    "calls, would tie it again."
                )
            model.config.tie_word_embeddings = was_tied
        remove_banks(model)
        return model

    # --- combining adapters ----------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: combining.CombinationType = "linear",
        *,
        density: float | None = None,
        majority_sign_method: combining.MajoritySignMethod = "total",
    ) -> None:
        """Add an adapter that combines others, as PEFT's does; it is neither active nor trained until you say so.

        The adapters may have blocks of different sizes, arrangements and targets. Nothing but the new adapter changes;
        if its name is taken, this only warns.

        Args:
            adapters: their names.
            weights: one for each, of any sign.
            adapter_name: of the new one.
            combination_type: 'linear': the exact weighted sum. 'magnitude_prune', 'dare_linear': the sum after
                pruning, which leaves the largest values, or random ones scaled by 1 / density. 'ties', 'dare_ties':
                after that pruning, entry by entry, the mean of the values with the majority's sign.
            density: the share that pruning leaves of each adapter's values, counted in its own blocks per target; not
                for 'linear'.
            majority_sign_method: whether the sign is elected by the sum of the values ('total'), or by counting signs.

        Raises:
            ValueError: for an unknown adapter or type, one without blocks, one with biases or whole modules of its
                own, a number of weights that is not that of the adapters, or rows and columns that cross too much.
        """
        method = combining.Method(combination_type, density, majority_sign_method)
        is_new = adapter_name not in self.peft_config
        try:
            combining.add_weighted_adapter(self, adapters, weights, adapter_name, method)
        except BaseException:
            if is_new:
                self.peft_config.pop(adapter_name, None)
                take_out(self.model, adapter_name)
            raise

    # --- state dicts -----------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        return states.to_save(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        return states.to_load(model, config, adapter_name, state_dict)

    # --- one batch, several adapters -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Hand `adapter_names` (one per sample, "__base__" for none) to every layer for the time of one call."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first, or train "
                "one adapter at a time."
            )
        unknown = set(names) - {"__base__"} - set(getattr(self.model, BANK))
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; "
                f"the model has {', '.join(sorted(getattr(self.model, BANK)))}."
            )
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        in_encoder = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        undo = []
        with put_back_afterwards(undo):
            for module in self.modules():
                if isinstance(module, (Linear, AuxiliaryTrainingWrapper)):
                    hook = partial(_add_adapter_names, names=names if module in in_encoder else repeated)
                    undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _add_adapter_names(module, args, kwargs, names):
    return args, {**kwargs, "adapter_names": names}


def _check_name(model: nn.Module, adapter: str) -> None:
    """Refuse what cannot be wrapped before anything is touched."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already: add to it by model.add_adapter(name, config), or wrap its base model, "
            "model.get_base_model(), or model.unload()."
        )
    own = getattr(model, BANK, None)  # inside of a compiled model
    inner = next((name for name, banks in banks_of(model).items() if banks is not own), None)
    if inner is not None:
        raise ValueError(
            f"A part of the model, {inner.partition('.')[0]}, has SMT adapters of its own: wrap the parts one by one, "
            "with different adapter names, or the whole model alone (part.unload() gives a part without)."
        )
    if not adapter or "." in adapter or hasattr(nn.ModuleDict, adapter) or adapter in (BANK, "weight"):
        raise ValueError(
            f"An SMT adapter cannot be called {adapter!r}: a name must not be empty, hold a dot, be one that "
            f"torch.nn.ModuleDict has for itself, or {BANK} or weight, which the names of all adapters' state have."
        )
    if any(adapter in layer.merged_adapters for layer in layers_of(model)):
        raise ValueError(
            f"The model has an adapter {adapter!r} already, which is merged into its weights; call "
            "unmerge_adapter() first, or give the new adapter another name."
        )


def _check_rows(model: nn.Module, configs: Mapping[str, SMTConfig], adapter: str) -> None:
    """Refuse what PEFT's wrappers of rows cannot do: to change an adapter's rows, or to serve one that has none."""
    having = {
        name for module in model.modules() if isinstance(module, TrainableTokensWrapper) for name in module._adapters
    }
    if adapter in having:
        raise ValueError(
            f"The model has rows of an earlier adapter {adapter!r} (trainable_token_indices), which stay as they are; "
            "call delete_adapter() or unload() first, or give the new adapter another name."
        )
    others = [name for name in configs if name != adapter]
    if others and bool(configs[adapter].trainable_token_indices) != bool(having):
        raise ValueError(
            f"Adapter {adapter!r} and {', '.join(others)}: of the adapters of one model either all have "
            "trainable_token_indices, or none has."
        )


def _check_tokens(config: SMTConfig, model: nn.Module) -> None:
    """Refuse in `trainable_token_indices` a token that the model does not have."""
    tokens = config.trainable_token_indices or {}
    if not isinstance(tokens, Mapping):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        name = next((of for of, module in model.named_modules() if module is embedding), "embed_tokens")  # as in PEFT
        tokens = {name: tokens}
    for name, rows in tokens.items():
        for module_name, module in model.named_modules():
            if f".{module_name}".endswith(f".{name}") and isinstance(
                weight := getattr(module, "weight", None), torch.Tensor
            ):
                count = getattr(weight, "ds_shape", weight.shape)[0]
                if rows and max(rows) >= count:
                    raise ValueError(
                        f"trainable_token_indices names token {max(rows)}, and {module_name} has {count} rows; resize "
                        "the embeddings first: model.resize_token_embeddings(len(tokenizer))."
                    )


def _as_it_is(layer: nn.Module, args: tuple) -> None:
    """A hook that does nothing."""


def forget_unloaded(model: nn.Module, adapter: str) -> None:
    """Take an adapter out whose config was loaded, and whose weights are refused."""
    owner = next((m for m in model.modules() if isinstance(m, SMTModel) and adapter in m.peft_config), None)
    root, configs = (owner.model, owner.peft_config) if owner else (model, model.peft_config)
    if getattr(configs.get(adapter), "awaits_weights", False):
        take_out(root, adapter)
        if not len(getattr(root, BANK)):
            remove_banks(root)
        take_out_of_wrappers(root, adapter)
        for name in configs[adapter].trained_before:
            with contextlib.suppress(AttributeError):  # of an adapter that this one took the place of
                root.get_parameter(name).requires_grad_()
        del configs[adapter]
