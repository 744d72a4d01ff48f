# SPDX-License-Identifier: Apache-2.0
"""Broken copies of what stands in for PEFT's layers and files, and what must notice each."""

from broken_copies import Mutant

HOSTILE, FILES = "peft/test_hostile_adapters.py::test_", "peft/test_adapter_files.py::test_"
FUSED, REASONS = "peft/test_peft.py::test_", "peft/test_peft_reasons.py::test_"
BY_SAMPLE = "peft/test_by_sample.py::test_"
OUTSIDE = f"{BY_SAMPLE}another_checkpoint_outside_of_the_block_is_an_error"
OPAQUE = "peft/test_opaque.py::test_"
DORA = "peft/test_dora.py::test_"
QUANTISED = "peft/test_quantised.py::test_"
EXPERTS, EXPERT_FILES = "peft/test_experts.py::test_", "peft/test_expert_files.py::test_"
LEFT = "layers/test_sibling_search.py::test_unloaded_models_are_plain"
UNDIFFERENTIATED = f"{OPAQUE}an_opaque_layer_that_does_not_differentiate_is_left_to_peft"
SHARDED = "commands/test_launch.py::test_sharded_processes_come_to_what_one_comes_to"
LOAD = "PeftModel.from_pretrained(model, checked, adapter_name, is_trainable)"

# By file and the tests that must notice: what is broken, and how, as "right => wrong".
COPIES = {
    ("linear", f"{LEFT} {FUSED}a_mixed_model"): {
        "unloaded models have siblings left": "        separate(model) =>         pass",
    },
    ("linear", f"{FUSED}a_mixed_model"): {
        "new layers are not fused": "return fuse(super()._create => return (super()._create",
    },
    ("linear", f"{DORA}what_is_left_to_peft"): {
        "two of DoRA's add up": "if len(adapters) > 1 and => if False and",
        "hooks on a magnitude are not seen": "if _is_observed(magnitude): => if False:",
    },
    ("linear", f"{DORA}dropout_is_by_the_layer_s_mode"): {
        "dropout goes by its own mode": "if layer.training else 0.0 => if True else 0.0",
    },
    ("linear", f"{OPAQUE}dora_is_left_to_peft"): {
        "a weight that nobody knows has a norm": "or type(weight) is weights.Opaque: => or False:",
    },
    ("linear", f"{REASONS}what_is_not_fused"): {
        "any weight is taken for a dense one": "return type(weight) in PLAIN and => return 1 or",
        "hooks on what is not called are not seen": "m._forward_hooks or => False or",
    },
    ("experts", f"{EXPERTS}as_peft_computes"): {
        "lora_B has its experts outermost": "(-1, E)).permute(2, 0, 1) => (E, -1)).transpose(0, 1)",
        "experts are not scaled": "float(scaling), 0.0, ALL => 1.0, 0.0, ALL",
        "Llama-4's factors keep their roles": "_features == by_columns: => _features is None:",
    },
    ("experts", f"{EXPERTS}one_of_the_weights_or_both"): {
        "the wrapper inside is left out": "        wrappers.append(module) =>         pass",
    },
    ("experts", f"{EXPERTS}merging_is_peft_s"): {
        "merged adapters of experts are added again": "if wrapper.merged_adapters or => if",
    },
    ("experts", f"{EXPERTS}several_adapters_stored_and_active"): {
        "disabled adapters of experts run": "_adapters or wrapper._disable_adapters: => _adapters:",
    },
    ("experts", f"{EXPERTS}dropout_of_the_low_rank_path"): {
        "experts drop in evaluation": "if self.training else 0.0 => if True else 0.0",
    },
    ("experts", "peft/test_expert_reasons.py::test_what_is_left_to_peft_is_said"): {
        "trained weights of experts get no gradient": "if t.requires_grad: => if False:",
        "hooks on experts are not seen": "any(is_observed(m) for => any(False for",
        "experts of other devices are looked for here": "if module._is_expert_parallel: => if 0:",
        "implementations of others are replaced": "if how not in _ALIKE: => if 0:",
    },
    ("expert_files", f"{EXPERT_FILES}there_and_back"): {
        "gate and up change places": "e].chunk(len(names)), => e].chunk(len(names))[::-1],",
        "scalings of other ranks are lost": "scaling / _scaling(values, rank) => scaling",
    },
    ("expert_files", f"{EXPERT_FILES}each_expert_is_a_plain_adapter"): {
        "an expert has the first one's lora_B": "b[..., e].chunk => b[..., 0].chunk",
        "modules keep the names they have here": "above = above.replace => above.replace",
    },
    ("expert_files", f"{EXPERT_FILES}parts_of_one_weight_may_have_adapters_of_their_own"): {
        "parts share the first one's lora_A": "if all(t.shape == a[0].shape => if all(True or",
    },
    ("expert_files", f"{EXPERT_FILES}what_is_wrong_is_refused"): {
        "parts of no expert are nobody's": "            if keys: =>             if 0:",
    },
    ("expert_files", f"{EXPERT_FILES}experts_that_are_modules_are_as_any_others"): {
        "experts that are modules are joined": "if any(str(e) in => if 0 and any(str(e) in",
    },
    ("expert_files", f"{EXPERT_FILES}a_square_layout_of_unknown_origin_is_refused"): {
        "square layouts are of this release": "found.groups())) >= _NEW => found.groups()))",
    },
    ("../layers/experts", f"{EXPERTS}as_peft_computes"): {
        "tokens get each other's outputs": "_sorted(y, back, order) => _sorted(y, order, back)",
        "a token's gradient is of its first expert": ".sum(1) if len(dx) => [:, 0] if len(dx)",
        "an expert's rows begin a row late": "numbers = torch => numbers = 1 + torch",
    },
    ("../layers/active", f"{EXPERTS}several_adapters_stored_and_active"): {
        "ranks of stacks are added up along the rows": "(b, dim=-1) => (b, dim=1)",
    },
    ("linear", f"{FUSED}disabled_and_merged"): {
        "disabled adapters run": "kwargs or self._disable_adapters or => kwargs or",
        "merged adapters are added again": "adapters or self.merged_adapters): => adapters):",
    },
    ("linear", f"{FUSED}dropout_keeps_what_it_should"): {
        "dropout goes on in evaluation": "if dropout.training and type => if type",
    },
    ("linear", f"{QUANTISED}inference_is_the_librarys"): {
        "inference multiplies by dense weights": "mixed or x is => 1 or x is",
    },
    ("linear", f"{QUANTISED}checkpointing_draws_the_same_elements"): {
        "a pass without gradients is PEFT's": "or base.training or torch => or torch",
    },
    ("linear", f"{QUANTISED}under_autocast_outputs_have_peft_s_dtype"): {
        "autocast decides the dtype of outputs": "        autocast = False => ",
    },
    ("../operator/op", f"{QUANTISED}one_weight_is_dense_at_a_time_and_none_is_kept"): {
        "a dense weight is kept for few tokens": "x.is_cpu and whole and => x.is_cpu and",
    },
    ("../layers/siblings", f"{QUANTISED}the_search_for_siblings_packs_nothing"): {
        "a search for siblings changes weights": "= is_linear(module) => = False",
    },
    ("../operator/weights", f"{QUANTISED}a_weight_that_was_packed_for_inference_has_gradients"): {
        "a packed weight is read as it was": '"packing_format_for_cpu", False) => "packed", False)',
    },
    ("../operator/weights", f"{QUANTISED}why_a_layer_is_not_fused"): {
        "scales that are lost are none": "    if scales is None: =>     if False:",
        "a state that is lost is none": "    if state is None: =>     if False:",
        "a product without gradient is taken": "if any(getattr(weight, name, None) => if any(0",
    },
    ("../operator/weights", UNDIFFERENTIATED): {
        "a kernel without gradients is taken": 'getattr(module, "SUPPORTS_TRAINING", True) => 1',
    },
    ("../operator/op", f"{OPAQUE}the_rest_is_added_to_what_an_opaque_layer_makes"): {
        "an opaque output gets a bias's gradient": "dy if one.w is => dy if 0 is",
    },
    ("../operator/blocks", f"{OPAQUE}the_rest_is_added_to_what_an_opaque_layer_makes"): {
        "what an opaque layer made is lost": "b.mT, part, scaling => b.mT, None, scaling",
    },
    ("../operator/library", f"{QUANTISED}the_operator_takes_quantised_weights"): {
        "a quantised weight is cut": "x.new_empty(b.shape[-2], 0) => w[:, :0]",
    },
    ("../layers/mixed", f"{BY_SAMPLE}as_each_sample_alone"): {
        "runs of rows overlap": "start, end = end, end + => start, end = max(end - 1, 0), end +",
    },
    ("../layers/mixed", f"{BY_SAMPLE}wrong_names"): {
        "any number of samples is taken": "and not torch.is_grad_enabled() => or True",
    },
    ("../layers/mixed", OUTSIDE): {
        "a checkpoint may ask after the block": "if self.ended and not self.inside: => if False:",
    },
    ("../layers/gated", f"{BY_SAMPLE}the_kernels_take_mixed_batches"): {
        "a gated MLP mixes by other products": "*last], True, impl) => *last], True)",
    },
    ("by_sample", f"{BY_SAMPLE}checkpoints_find_their_own_block"): {
        "a checkpoint takes the names of now": "with block.within(layers): => if True:",
        "a model keeps a block": "[CHECKPOINT] = checkpoint\n => [CHECKPOINT]\n",
    },
    ("by_sample", OUTSIDE): {
        "checkpoints do not find the block": "block if block.checkpointed else => 0 or",
    },
    ("by_sample", f"{BY_SAMPLE}losses_are_those_of_each_adapter_alone"): {
        "losses are of all tokens": ".sum() / counts[of].sum() => .sum() / counts.sum()",
    },
    ("linear", f"{BY_SAMPLE}as_each_sample_alone"): {
        "every name is the first one": "found = known[name] => found = [*known.values()][0]",
    },
    ("patch", f"{REASONS}what_is_refused"): {
        "a compiled model is patched": '"_orig_mod" in part._modules or part._ => 0 and part._',
    },
    ("patch", f"{REASONS}a_release_that_was_not_tested"): {
        "a PEFT that was not tested is patched": "if not TESTED[0] <= => if False and TESTED[0] <=",
    },
    ("config", f"{HOSTILE}an_attack"): {
        "a key that comes twice is taken": "if key in values: => if False:",
        "a switch of the future is ignored": "if refused: => if False:",
        "a dropout may be negative": "_is_number(v) and 0 <= v < 1 => _is_number(v) and v < 1",
        "a start may be a number": "type(v) in (bool, str) and v in _STARTS => v in _STARTS",
        "token ids need no list": "return isinstance(value, list) and all( => return all(",
        "tokens' names may be any": "isinstance(value, dict) and _are_names([*value]) => 1",
        "numbers of a config are not checked": "if not right(v): => if False:",
    },
    ("rehearsal", f"{HOSTILE}an_attack"): {
        "an adapter is tried on the model, no copy": "= _without_memory(model) => = model",
    },
    ("rehearsal", f"{HOSTILE}a_rank_above_a_layer_s_width_has_to_be_allowed"): {
        "any rank is allowed": "if r > width: => if False:",
    },
    ("rehearsal", f"{HOSTILE}tokens_that_a_model_does_not_have"): {
        "tokens beyond the end are trained": "if tokens and max => if False and max",
    },
    ("rehearsal", f"{HOSTILE}a_failure_after_all_checks_changes_nothing"): {
        "a failure leaves classes behind": "            module.__class__ = kind\n => ",
        "a failure leaves other biases behind": "tensor.detach().copy_(value) => pass",
    },
    ("files", f"{HOSTILE}an_attack"): {
        "weights of NaN are loaded": "not torch.isfinite(tensors => 0 and (tensors",
        "weights finite in float64 alone are loaded": "tensors[key].to(dtype) => tensors[key]",
        "a file may overwrite frozen weights": "frozen := changed - overwritten => frozen := 0",
        "tensors that nobody asked for are taken": "if missing or unexpected: => if missing:",
        "a file without all tensors is taken": "if missing or unexpected: => if unexpected:",
    },
    ("files", f"{HOSTILE}other_embeddings_have_to_be_allowed"): {
        "embeddings are overwritten unasked": "embeddings if trusted else set() => embeddings",
    },
    ("files", f"{HOSTILE}tensors_are_not_read_before_the_header_was_compared"): {
        "tensors of another shape are read": "if shape != must: => if False:",
    },
    ("files", f"{HOSTILE}a_pattern_that_never_ends"): {
        "a pattern may run for ever": "names, _PATTERN_SECONDS) => names, 3.0)",
    },
    ("files", f"{HOSTILE}what_peft_does_not_load_is_noticed"): {
        "what PEFT has loaded is not looked at": "if not (found.is_meta or => if 0 and (0 or",
    },
    ("files", f"{HOSTILE}an_adapter_replaced_while_it_is_read"): {
        "weights are read with the config of others": "if _hash_in(now) != wanted: => if False:",
        "PEFT reads the file once more": f"{LOAD} => {LOAD.replace('checked', 'folder')}",
    },
    ("files", "test_faults.py::test_killed_at_every_step_of_saving"): {
        "the config's name decides, not its hash": ".hexdigest() == wanted: => .hexdigest():",
    },
    ("files", f"{FILES}from_peft_to_peft"): {
        "what is loaded is not patched": "patch.patch_peft(loaded) => pass",
        "a loaded adapter trains unasked": f"{LOAD} => {LOAD.replace('is_trainable', 'True')}",
    },
    ("files", f"{FILES}a_merged_or_compiled_model_saves_the_same"): {
        "a merged head is saved with its adapter in it": (
            'any(getattr(module, "merged", False) => any(False'
        ),
    },
    ("files", SHARDED): {
        "a shard is saved for the whole": "t.full_tensor() => t.to_local()",
    },
    ("../files", f"{FILES}once_the_weights_have_their_name_it_is_the_new_adapter"): {
        "the first file gets its name before the second is written": (
            "os.fsync(file.fileno()) => os.fsync(file.fileno()), os.replace(temporary[path], path)"
        ),
        "Ctrl-C deletes the config of new weights": "if first.exists(): => if True:",
    },
}
MUTANTS = [
    Mutant(what, f"fastlora/peft/{file}.py".replace("peft/../", ""), *change.split(" => "), tests)
    for (file, tests), copies in COPIES.items()
    for what, change in copies.items()
]
