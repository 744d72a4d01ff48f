# SPDX-License-Identifier: Apache-2.0
"""The broken copies of the code that `mutants.py` tries: a line each, and what must notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One change of one file; ``tests`` are node ids below tests/, of which one has to fail."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str

    @property
    def path(self) -> Path:
        """The file: of `fastlora`, or with its folder's name of the kernels."""
        return ROOT / ("kernels" if "/" in self.file else "fastlora") / self.file


MUTANTS = [
    # forward
    Mutant(
        "the low-rank product is not scaled",
        "torch_impl.py",
        "y = expand(s, b.t(), scaling, x.new_empty",
        "y = expand(s, b.t(), 1.0, x.new_empty",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "the bias is dropped where there is an adapter",
        "torch_impl.py",
        "x.new_empty(x.shape[0], w.shape[0]), bias)",
        "x.new_empty(x.shape[0], w.shape[0]))",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "float32 factors are cut to one bfloat16 term",
        "torch_impl.py",
        "    return high, rest.nan_to_num_(0.0, 0.0, 0.0)",
        "    return high, torch.zeros_like(rest)",
        "test_kernels.py::test_the_torch_implementation_of_large_inputs",
    ),
    Mutant(
        "a block takes the rows of the first",
        "torch_impl.py",
        "return t if rows.stop - rows.start == t.shape[0] else t[rows]",
        "return t[: rows.stop - rows.start]",
        "test_kernels.py::test_more_rows_than_one_block_of_the_torch_implementation",
    ),
    Mutant(
        "y keeps the rows of x only",
        "functional.py",
        "return [y.reshape(*shape[:-1], y.shape[1]) for y in ys]",
        "return [y.reshape(-1, y.shape[1]) for y in ys]",
        "test_operator.py::test_leading_dimensions",
    ),
    Mutant(
        "autocast rounds float32 adapters",
        "functional.py",
        "if lora_A is not None and lora_A.dtype != torch.float32:",
        "if lora_A is not None:",
        "test_operator.py::test_float32_adapters_keep_their_precision_under_autocast",
    ),
    Mutant(
        "a rank of b other than a's is taken",
        "functional.py",
        "        and b[1] == a[0] >= 1",
        "        and a[0] >= 1",
        "test_operator.py::test_wrong_arguments",
    ),
    Mutant(
        "a scaling that is not finite is taken",
        "functional.py",
        "        and -math.inf < scaling < math.inf",
        "        and True",
        "test_operator.py::test_wrong_arguments",
    ),
    # backward
    Mutant(
        "ds is not scaled",
        "torch_impl.py",
        "        ds = (dy @ b).mul_(scaling) if need_ds else None",
        "        ds = (dy @ b) if need_ds else None",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "db is not scaled",
        "torch_impl.py",
        "return ds, (dy.t() @ s).mul_(scaling)",
        "return ds, dy.t() @ s",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "dx has no low-rank part",
        "torch_impl.py",
        "        _add_product(dx, ds, a)",
        "        pass",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "dx is that of the last projection",
        "torch_impl.py",
        "dx = dy @ w if dx is None else dx.addmm_(dy, w)",
        "dx = dy @ w",
        "test_projections.py::test_acceptance_rule",
    ),
    Mutant(
        "a gradient that is not asked for is made",
        "torch_impl.py",
        "das[i] = part if needs[i][0] else None",
        "das[i] = part",
        "test_projections.py::test_only_what_is_asked_for",
    ),
    Mutant(
        "dy is written to",
        "torch_impl.py",
        "        ds = (dy @ b).mul_(scaling) if need_ds else None",
        "        ds = dy.mul_(scaling) @ b if need_ds else None",
        "test_operator.py::test_inputs_are_never_modified",
    ),
    Mutant(
        "a trained bias gets no gradient",
        "ops.py",
        "dbias = [dy.sum(0) if flags[3] else None",
        "dbias = [None if flags[3] else None",
        "test_projections.py::test_trained_weights_and_biases",
    ),
    Mutant(
        "second derivatives are those of a constant",
        "ops.py",
        "    if torch.is_grad_enabled():  # create_graph=True: these gradients will be "
        "differentiated\n        dx, da, db",
        "    if False:\n        dx, da, db",
        "test_operator.py::test_gradcheck_and_double_backward",
    ),
    Mutant(
        "projections of other scalings take the first one's",
        "ops.py",
        "    if all(p.scaling == first.scaling for p in others):",
        "    if True:",
        "test_projections.py::test_modes_and_subclasses_see_the_operator",
    ),
    # dropout
    Mutant(
        "kept elements are not scaled",
        "torch_impl.py",
        "return s if seed is None else s.mul_(kept_scale(p))",
        "return s",
        "test_operator.py::test_matches_the_oracle_through_autograd",
    ),
    Mutant(
        "every block drops the same elements",
        "dropout.py",
        "        self.next.add_(self.step)",
        "        pass",
        "test_kernels.py::test_more_rows_than_one_block_of_the_torch_implementation",
    ),
    Mutant(
        "every call drops the same elements",
        "dropout.py",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)",
        "return torch.full((1,), 7, dtype=torch.int64, device=device)",
        "test_operator.py::test_successive_seeds_differ test_operator.py::"
        "test_dropout_is_that_of_torch_in_distribution",
    ),
    Mutant(
        "p is the share that is kept",
        "dropout.py",
        "return min(round(p * 65536), 65535) - 32768",
        "return min(round((1 - p) * 65536), 65535) - 32768",
        "test_operator.py::test_dropout_is_that_of_torch_in_distribution",
    ),
    Mutant(
        "the seed is kept from torch's generator",
        "dropout.py",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, "
        "generator=torch.Generator(device))",
        "test_operator.py::test_checkpoint_draws_the_same_mask_again "
        "test_operator.py::test_successive_seeds_differ",
    ),
    Mutant(
        "something is dropped in evaluation",
        "layer.py",
        "self.lora_dropout[name] if self.training else 0.0,",
        "self.lora_dropout[name],",
        "test_layer.py::test_several_adapters_with_dropout_drop_independently",
    ),
    Mutant(
        "a second adapter drops what the first does",
        "several.py",
        "        seed = new_seed(x.device) if p else None",
        "        seed = torch.ones(1, dtype=torch.int64, device=x.device) if p else None",
        "test_layer.py::test_several_adapters_with_dropout_drop_independently",
    ),
    # layer
    Mutant(
        "alpha / r with rsLoRA",
        "hyperparameters.py",
        "math.sqrt(r)",
        "r",
        "test_layer.py::test_scaling",
    ),
    Mutant(
        "the base weight trains",
        "layer.py",
        "        self.weight.requires_grad_(False)\n        if self.bias",
        "        if self.bias",
        "test_layer.py::test_starts_as_its_base_and_trains_only_the_adapter",
    ),
    Mutant(
        "an adapter that is not active trains",
        "layer.py",
        "            self.lora_A[name].requires_grad_(name in names)",
        "            self.lora_A[name].requires_grad_(True)",
        "test_layer.py test_inject.py::test_adapters_are_switched_and_only_active_ones_train",
    ),
    Mutant(
        "unmerging subtracts",
        "layer.py",
        '        self._parameters["weight"] = base\n',
        '        self._parameters["weight"] = nn.Parameter(\n'
        "            self.weight - sum(map(self.delta_weight, self.merged_adapters)), False\n"
        "        )\n",
        "test_layer.py::test_unmerge_restores_every_bit",
    ),
    Mutant(
        "merging writes to a shared weight",
        "layer.py",
        '        self._parameters["weight"] = nn.Parameter(merged, requires_grad=False)',
        "        self._buffers['_base_weight'] = self.weight.clone()\n"
        "        self.weight.copy_(merged)",
        "test_layer.py::test_merge_leaves_a_shared_weight_alone",
    ),
    Mutant(
        "a merged layer adds its adapters again",
        "layer.py",
        "        if self.disable_adapters or self.merged_adapters or not self.active_adapters:",
        "        if self.disable_adapters or not self.active_adapters:",
        "test_layer.py::test_unmerge_restores_every_bit test_layer.py::"
        "test_merged_layers_can_be_moved_and_cast test_layer.py::test_conv1d",
    ),
    Mutant(
        "a safe merge takes what is not finite",
        "layer.py",
        "        if safe and not torch.isfinite(merged).all():",
        "        if False:",
        "test_layer.py::test_safe_merge_refuses_infinities_and_changes_nothing",
    ),
    Mutant(
        "a base checkpoint has to hold adapters",
        "layer.py",
        "        if own.keys().isdisjoint(state_dict):",
        "        if False:",
        "test_layer.py::test_a_base_checkpoint_loads_unchanged",
    ),
    Mutant(
        "deleting goes by the beginning of a name",
        "layer.py",
        "self.active_adapters = tuple(n for n in self.active_adapters if n != name)",
        "self.active_adapters = tuple(n for n in self.active_adapters if not n.startswith(name))",
        "test_inject.py::test_deleting_foo_leaves_foobar",
    ),
    # siblings
    Mutant(
        "siblings are handed out for another tensor",
        "siblings.py",
        "held.group is group and held.x is x:",
        "held.group is group:",
        "test_siblings.py::test_another_tensor",
    ),
    Mutant(
        "siblings are handed out after x was written to",
        "siblings.py",
        "    return x._version, x.requires_grad,",
        "    return 0, x.requires_grad,",
        "test_siblings.py::test_x_written_to_in_between",
    ),
    Mutant(
        "siblings are handed out on another stream",
        "siblings.py",
        "dtype, hooks, _stream(x)",
        "dtype, hooks",
        "test_siblings.py::test_another_stream",
    ),
    Mutant(
        "siblings are handed out after a parameter was written to",
        "siblings.py",
        "        (t._version, t.requires_grad, t.data_ptr())",
        "        (0, t.requires_grad, t.data_ptr())",
        "test_siblings.py::test_changed_in_between",
    ),
    Mutant(
        "siblings are handed out twice",
        "siblings.py",
        "    seat = held.seats.pop(id(member), None)",
        "    seat = held.seats.get(id(member))",
        "test_siblings.py::test_several_forwards_before_a_backward test_siblings.py::"
        "test_the_same_outputs_gradients_and_dropout",
    ),
    Mutant(
        "siblings without gradients are handed out when they are asked for",
        "siblings.py",
        "x.requires_grad, torch.is_grad_enabled(), dtype, hooks",
        "x.requires_grad, True, dtype, hooks",
        "test_siblings.py::test_gradients_switched_on_in_between",
    ),
    Mutant(
        "siblings cross into a checkpoint",
        "siblings.py",
        "torch.is_grad_enabled(), dtype, hooks",
        "torch.is_grad_enabled(), dtype, None",
        "test_siblings.py::test_a_sibling_on_each_side_of_a_checkpoint",
    ),
    Mutant(
        "siblings are computed under hooks that may change x",
        "siblings.py",
        "        member._forward_pre_hooks\n        or member._backward_hooks",
        "        member._backward_hooks",
        "test_siblings.py::test_hooks_on_a_member",
    ),
    Mutant(
        "threads share what is held",
        "siblings.py",
        "_slot = threading.local()",
        "_slot = type('Slot', (), {})()",
        "test_siblings.py::test_many_threads",
    ),
    Mutant(
        "the gated MLP forgets up",
        "gated_mlp.py",
        "return ACTIVATIONS[self.activation][0](self.g).mul_(self.u)",
        "return ACTIVATIONS[self.activation][0](self.g)",
        "test_gated_mlp.py::test_acceptance_rule",
    ),
    Mutant(
        "the gated MLP's gradient of up is that of gate's input",
        "gated_mlp.py",
        "du = (act(self.g) if self.act is None else self.act).mul_(dh)",
        "du = self.g * dh",
        "test_gated_mlp.py::test_acceptance_rule",
    ),
    # adapters and their files
    Mutant(
        "weights that are not finite are loaded",
        "adapters.py",
        "    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:\n"
        "        raise ValueError",
        "    if broken := []:\n        raise ValueError",
        "test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "a file may overwrite frozen weights",
        "adapters.py",
        "            if changed := [key for key in copies if not _is_own_weight(file, key, made)]:",
        "            if changed := []:",
        "test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "tensors that nobody asked for are taken",
        "adapters.py",
        "    if keys != wanted:",
        "    if wanted - keys:",
        "test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "a key that comes twice is taken",
        "adapters.py",
        "    if len(values) != len(pairs):",
        "    if False:",
        "test_hostile_adapters.py::test_a_config_file_that_is_malformed",
    ),
    Mutant(
        "a pattern may run for ever",
        "adapters.py",
        "made = plan(model, config, adapter, adapter_dtype, seconds=_PATTERN_SECONDS)",
        "made = plan(model, config, adapter, adapter_dtype, seconds=3.0)",
        "test_hostile_adapters.py::test_a_pattern_that_never_ends",
    ),
    Mutant(
        "an adapter is written in place",
        "adapters.py",
        "temporary = {path: temporary_of(path) for path in contents}",
        "temporary = {path: path for path in contents}",
        "test_adapter_files.py::test_a_full_disk_leaves_the_old_adapter test_adapter_files.py::"
        "test_where_it_cannot_be_written",
    ),
    Mutant(
        "the first file gets its name before the second is written",
        "adapters.py",
        "                os.fsync(file.fileno())\n",
        "                os.fsync(file.fileno())\n            os.replace(temporary[path], path)\n",
        "test_adapter_files.py::test_a_failing_system_call_leaves_the_old_adapter",
    ),
    Mutant(
        "the config's name decides, not its hash",
        "adapters.py",
        "            if path.is_file() and _hash(data := _head(path)) == wanted:",
        "            if path.is_file() and (data := _head(path)):",
        "test_adapter_files.py::test_killed_in_the_middle_there_is_a_whole_adapter",
    ),
    Mutant(
        "a bias stays mapped to its file",
        "adapters.py",
        ".to(like.dtype, copy=True)",
        ".to(like.dtype)",
        "test_hostile_adapters.py::test_what_is_written_to_the_file_later_reaches_no_model",
    ),
    Mutant(
        "a loaded adapter trains unasked",
        "adapters.py",
        "    apply(model, made, adapter, tensors, trainable=is_trainable)",
        "    apply(model, made, adapter, tensors, trainable=True)",
        "test_adapter_files.py::test_a_loaded_adapter_trains_when_asked_or_switched_to",
    ),
    # plans and the tuner
    Mutant(
        "the slowest runs",
        "plans.py",
        "best = min((i for i in usable if i in times)",
        "best = max((i for i in usable if i in times)",
        "test_plans.py::test_the_fastest_measured_runs_in_each_direction",
    ),
    Mutant(
        "a GPU is idle when its time is taken",
        "timing.py",
        "    while not full and spin < MOST_SPIN:",
        "    while False:",
        "test_timing.py::test_a_phase_is_the_time_of_its_kernels",
    ),
    Mutant(
        "a way that fails takes the others along",
        "timing.py",
        "            if failed is None:",
        "            if True:",
        "test_timing.py::test_a_way_that_fails_fails_alone",
    ),
    Mutant(
        "few tokens are chosen for as if the host took no time",
        "plans.py",
        "        times = with_host or seconds",
        "        times = seconds",
        "test_tuner.py::test_few_tokens_are_timed_with_the_host_too",
    ),
    Mutant(
        "few tokens are told by their number alone",
        "plans.py",
        "elements, limit = M * K,",
        "elements, limit = M,",
        "test_plain.py::test_few_is_counted_in_elements_of_x",
    ),
    Mutant(
        "few tokens keep a mask and wider copies of many",
        "ops.py",
        "            keeps_more |= seed",
        "            seed",
        "test_plain.py::test_few_is_less_where_more_is_kept",
    ),
    Mutant(
        "few tokens lose precision under autocast",
        "plans.py",
        "        and not torch._C._is_any_autocast_enabled()\n",
        "",
        "test_plain.py::test_where_the_operator_runs_all_the_same",
    ),
    Mutant(
        "few tokens of a gated MLP are not multiplied",
        "gated_mlp.py",
        "ACTIVATIONS[activation][0](g) * u, projections[2:], impl)",
        "ACTIVATIONS[activation][0](g), projections[2:], impl)",
        "test_plain.py::test_a_model_computes_the_same",
    ),
    Mutant(
        "a draw leaves for another implementation",
        "plans.py",
        "            if times[best] < 0.98 * times",
        "            if times[best] < 1.02 * times",
        "test_plans.py::test_a_draw_leaves_the_default",
    ),
    Mutant(
        "measurements hold for one number of tokens",
        "measured.py",
        "return _known(device).get(problem.bucketed())",
        "return _known(device).get(problem)",
        "test_plans.py::test_measurements_hold_for_their_bucket",
    ),
    Mutant(
        "measurements of other versions count",
        "measured.py",
        '        if content.get("versions") != versions(device.type):',
        "        if False:",
        "test_measured.py::test_other_versions_are_not_used_and_are_replaced",
    ),
    Mutant(
        "a file that is damaged stops the run",
        "measured.py",
        "    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:",
        "    except (ValueError, RecursionError) as error:",
        "test_measured.py::test_a_corrupt_file_is_set_aside_with_one_warning",
    ),
    Mutant(
        "processes that tune at once lose each other's results",
        "files.py",
        "            while not _taken(handle, kind | fcntl.LOCK_NB) and time.monotonic() < until:",
        "            while False:",
        "test_measured.py::test_processes_that_measure_at_once_keep_each_others_results",
    ),
    Mutant(
        "processes that save at once mix their files",
        "files.py",
        "            while not _taken(handle, kind | fcntl.LOCK_NB) and time.monotonic() < until:",
        "            while False:",
        "test_faults.py::test_two_processes_save_while_a_third_reads",
    ),
    Mutant(
        "processes write to one temporary file",
        "files.py",
        'f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"',
        'f".{path.name}.tmp"',
        "test_faults.py::test_a_file_replaced_while_another_process_replaces_it",
    ),
    Mutant(
        "a file has its name before it is whole",
        "files.py",
        "        os.replace(temporary, path)\n    except BaseException:",
        "    except BaseException:",
        "test_faults.py",
    ),
    Mutant(
        "an implementation that fails ends the tuning",
        "tuner.py",
        "    except Exception as error:  # whatever",
        "    except KeyError as error:  # whatever",
        "test_tuner.py::test_an_implementation_that_fails_is_left_out",
    ),
    Mutant(
        "an implementation that is named falls back",
        "plans.py",
        '        if why is not None and x.device.type != "meta":\n            raise RuntimeError(',
        "        if why is not None and x.device.type != \"meta\":\n            return 'torch'\n"
        "            raise RuntimeError(",
        "test_operator.py::test_triton_without_its_interpreter_says_how_to_switch_it_on",
    ),
    # each known kind of failure that docs/reliability.md lists, where none above is of it
    Mutant(
        "offsets of 32 bits",
        "fastlora_kernels/tiles.py",
        "    return (offs % size).to(tl.int64)",
        "    return offs % size",
        "test_kernels.py::test_offsets_past_two_billion_elements",
    ),
    Mutant(
        "columns of x taken as neighbours",
        "fastlora_kernels/shrink.py",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :]",
        "test_kernels.py::test_strides",
    ),
    Mutant(
        "tiles of rows in the second dimension of the grid",
        "fastlora_kernels/product.py",
        "grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)",
        "grid = cdiv(N, config.block_n), cdiv(M, config.block_m)",
        "test_kernels.py::test_grids_end_where_no_limit_is",
    ),
    Mutant(
        "kernels run on the current device",
        "fastlora_kernels/launch.py",
        "        if first.device.index != torch.cuda.current_device():",
        "        if False:",
        "test_kernels.py::test_kernels_run_on_the_device_of_their_tensors",
    ),
    Mutant(
        "kernels are compiled while a graph is captured",
        "fastlora_kernels/launch.py",
        "            if threading.get_ident() != capturing:",
        "            if True:",
        "test_kernels.py::test_nothing_is_compiled_while_a_graph_is_captured",
    ),
    Mutant(
        "a scaling becomes part of the compiled graph",
        "functional.py",
        "lora_B * scaling, 1.0",
        "lora_B * scaling if scaling != 1 else lora_B, 1.0",
        "test_operator.py::test_a_scaling_tensor_never_recompiles",
    ),
    Mutant(
        "the tuner draws from the user's random numbers",
        "tuner.py",
        "generator = torch.Generator(device).manual_seed(0)",
        "generator = None",
        "test_tuner.py::test_tuning_on_first_use",
    ),
    Mutant(
        "a config that does not fit ends the tuning",
        "tuner.py",
        "    except Exception as error:  # whatever a compiler",
        "    except KeyError as error:  # whatever a compiler",
        "test_tuner.py::test_a_problem_that_does_not_fit_is_left_out",
    ),
    Mutant(
        "a shard is saved for the whole",
        "adapters.py",
        "tensor = tensor.full_tensor()",
        "tensor = tensor.to_local()",
        "test_launch.py::test_sharded_processes_go_on_from_one",
    ),
    Mutant(
        "any weight is taken for a dense one",
        "peft_layer.py",
        "    return type(weight) in _PLAIN and weight.dtype in DTYPES",
        "    return True",
        "test_peft_reasons.py::test_what_is_not_fused",
    ),
    Mutant(
        "Ctrl-C while saving deletes the config that belongs to the weights",
        "adapters.py",
        "        if temporary[next(iter(contents))].exists():",
        "        if True:",
        "test_adapter_files.py::test_ctrl_c_as_the_weights_get_their_name",
    ),
    Mutant(
        "weights that were replaced are read with the config from before",
        "adapters.py",
        ".get(_CONFIG_HASH) != config_hash:",
        ".get(_CONFIG_HASH) == config_hash + 'of another':",
        "test_hostile_adapters.py::test_weights_replaced_between_two_looks_at_them",
    ),
    Mutant(
        "losses that are not finite are trained on",
        "finetune.py",
        "        if not math.isfinite(loss):",
        "        if False:",
        "test_finetune.py::test_a_run_that_diverges_says_so",
    ),
    Mutant(
        "Ctrl-C ends a run without a word",
        "finetune.py",
        "    except KeyboardInterrupt:",
        "    except ZeroDivisionError:",
        "test_finetune.py::test_ctrl_c_leaves_a_run_that_goes_on",
    ),
    # compiled programs
    Mutant(
        "a float32 sum is one chain from its start",
        "fastlora_kernels/tiles.py",
        "acc = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)",
        "acc += part",
        "test_ptx.py::test_float32_sums_start_from_zero",
    ),
    Mutant(
        "a copy may overtake a wgmma",
        "fastlora_kernels/configs.py",
        "    if on_the_way and chip.capability[0] == 9 and m < 64 <= n:",
        "    if on_the_way and chip.capability[0] == 9 and m < 32 <= n:",
        "test_ptx.py::test_no_copy_overtakes_a_wgmma",
    ),
    Mutant(
        "every number of rows is compiled for",
        "fastlora_kernels/columns.py",
        '@triton.jit(do_not_specialize=["steps", "keep_from"])',
        "@triton.jit",
        "test_specialized.py",
    ),
    Mutant(
        "every number of parts is compiled for",
        "fastlora_kernels/columns.py",
        '@triton.jit(do_not_specialize=["first_parts", "second_parts"])',
        "@triton.jit",
        "test_specialized.py",
    ),
    Mutant(
        "low-rank products of float32 factors take a dozen launches",
        "library_impl.py",
        "return outputs(x, projections, ss, _expanded(x, projections, ss)), ss",
        "return outputs(x, projections, ss), ss",
        "test_library.py",
    ),
]
