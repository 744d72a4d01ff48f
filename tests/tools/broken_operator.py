# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the operator: a line each, and what must notice it."""

from broken_copies import Mutant

# By file and the tests that must notice (file::name, without "test_", of this folder if no other is
# named): what, right, wrong.
COPIES = {
    ("scaled", "scaled::as_the_formula"): [
        ("a bias is scaled", "columns(z, one.scale, one.bias)", "columns(z, one.scale)"),
        ("what is scaled is not dropped", "= F.linear(x_hat, w)", "= F.linear(x, w)"),
        ("what is kept is not made larger", "- 1.0) * kept_scale(one.p)", "- 1.0)"),
        ("gradients of scale are not", "dscale.mul_(kept_scale(one.p))", "dscale"),
        ("what is dropped gets a gradient", "dx.addcmul_(part, ones)", "dx.add_(part)"),
        (
            "kernels drop of dx what is not dropped",
            "else (dy, _frozen(one), None)",
            "else (dz, one, ds)",
        ),
        ("dx lacks what has no scale", "dx if part is None else dx.add_(part)", "part or dx"),
    ],
    ("scaled", "scaled::float32_adapters_keep_their_digits"): [
        (
            "adapters get what is scaled and rounded",
            "given.append((i, dy, _adapter(one), kept[i], needs[i]))",
            "of = _adapter(one)._replace(b=one.b / one.scale[:, None])\n"
            "                given.append((i, dz, of, kept[i], needs[i]))",
        ),
    ],
    ("scaled", "scaled::a_scale_of_one_changes_no_bit"): [
        (
            "a bias is rounded twice",
            "of = _wide(scale), plus, plus, one",
            "z, of = z - (0 if bias is None else bias), (_wide(scale), plus, 0 * plus, one)",
        ),
    ],
    ("scaled", "scaled::what_is_kept"): [
        ("what a frozen scale multiplies is kept", "z if k else None for z", "z for z"),
    ],
    ("library", "scaled::a_scale_of_one_changes_no_bit"): [
        (
            "kernels get what is rounded before its bias is added",
            "else F.linear(x, w, one.bias)",
            "else F.linear(x, w).add_(0 if one.bias is None else one.bias)",
        ),
    ],
    ("library", "kernels/replay::weights_that_are_no_tensors"): [
        (
            "kernels get what is no tensor",
            "ds_db, da = _narrow(kernels.ds_db), _narrow(kernels.da)",
            "ds_db, da = kernels.ds_db, kernels.da",
        ),
    ],
    ("eager", "scaled::trained_weights_and_biases"): [
        ("few tokens scale the bias", "y = y + (bias - plus)", "y = y + (bias - plus) * scale"),
    ],
    ("op", "projections::trained_weights_and_biases"): [
        ("a trained bias gets no gradient", "if need_bias:", "if False:"),
    ],
    ("op", "operator::gradcheck_and_double_backward"): [
        ("second derivatives are those of a constant", "looked_into(*dys) or (", "("),
    ],
    ("op", "projections::compiled"): [
        (
            "projections of other scalings take the first one's",
            "return all(_number(one) == _number(first) for one in others)",
            "return True",
        ),
    ],
    ("dropout", "blocks::acceptance_rule"): [
        ("every block drops the same elements", "firsts[first : first + here]", "firsts[:here]"),
    ],
    (
        "dropout",
        "operator::successive_seeds_differ operator::dropout_is_that_of_torch_in_distribution",
    ): [
        ("every call drops the same elements", "randint(0, 2**63 - 1, (1,), ", "full((1,), 7, "),
    ],
    ("dropout", "operator::dropout_is_that_of_torch_in_distribution"): [
        ("p is the share that is kept", "p * 65536), 65535) - ", "(1 - p) * 65536), 65535) - "),
    ],
    (
        "dropout",
        "operator::checkpoint_draws_the_same_mask_again operator::successive_seeds_differ",
    ): [
        (
            "the seed is kept from torch's generator",
            "int64, device=device)",
            "int64, device=device, generator=torch.Generator(device))",
        ),
    ],
    ("op", "eager::few_is_counted_in_elements_of_x"): [
        (
            "few tokens are told by their number alone",
            "x.numel() > plans.FEW",
            "len(x) > plans.FEW",
        ),
    ],
    ("op", "eager::where_the_operator_runs_all_the_same"): [
        (
            "few tokens lose precision under autocast",
            "plans.FEW or torch._C._is_any_autocast_enabled():",
            "plans.FEW:",
        ),
    ],
    ("op", "unusual_operands::a_put_off_negation_is_carried_out"): [
        ("a negation that was put off is not carried out", " or t.is_neg()):", "):"),
        (
            "one of a weight is not carried out in backward",
            "kept = [] if plan else [",
            "kept = [] if True else [",
        ),
    ],
    ("eager", "unusual_operands::float16_is_scaled_before_it_overflows"): [
        (
            "few tokens of float16 are scaled when they are rounded",
            "x_hat, narrow = x, a.dtype == torch.float16",
            "x_hat, narrow = x, False",
        ),
    ],
    ("operands", "unusual_operands::small_scalings_of_float16_adapters_keep_their_bits"): [
        ("a scaling leaves float16 factors few bits", "if b.dtype == torch.float16:", "if False:"),
    ],
    ("op", "unusual_operands::a_second_import_works_and_leaves_the_first_as_it_is"): [
        (
            "a second import defines the operators again",
            'if not hasattr(torch.ops.fastlora, "lora_linears"):',
            "if True:",
        ),
    ],
    ("op", "batched_gradients::gradients_of_several_outputs_at_once"): [
        ("several gradients at once are read as one", "(wrapped(dy) or _legacy(dy))", "False"),
    ],
    ("eager", "batched_gradients::a_batch_of_adapters_on_one_x"): [
        ("y is written to under vmap", "torch.addmm if observed else Tensor", "Tensor"),
    ],
    ("blocks", "segments::what_a_row_drops_depends_on_its_number"): [
        (
            "a segment's mask begins at its own first row",
            "rows[0].stop, begin\n",
            "rows[0].stop, 0\n",
        ),
    ],
    ("blocks", "segments::as_a_loop"): [
        (
            "a segment's gradient is of the first rows",
            "(part, _part(x, rows), ds",
            "(part, x[: len(ds)], ds",
        ),
        (
            "a segment reads the first rows",
            "shrink_rows(_part(x, rows), *of)",
            "shrink_rows(x[: rows.stop - rows.start if rows else None], *of)",
        ),
    ],
    ("grouped", "stacked_weights::as_a_loop"): [
        (
            "every expert has the first one's bias",
            "(y_g, s_g, right_g, plus, of",
            "(y_g, s_g, right_g, bias[0], of",
        ),
        (
            "experts without rows have gradients of no one",
            "if all(of.sizes()) else like.new_zeros",
            "if 1 else like.new_ones",
        ),
        ("the second projection's dx is lost", "dx_g if added else None", "None"),
        ("rows are grouped one early", "offs=ends[1:])", "offs=ends[:-1])"),
    ],
    ("grouped", "stacked_weights::what_a_row_drops_depends_on_its_number"): [
        ("an expert's mask begins at its own first row", "seed, p, begin))", "seed, p, 0))"),
    ],
    ("grouped", "stacked_weights::float16_is_scaled_before_it_is_rounded"): [
        (
            "float16 is scaled after it is rounded",
            "(torch.float32, torch.bfloat16)",
            "(torch.float32, torch.bfloat16, torch.float16)",
        ),
    ],
    ("plans", "stacked_weights::frozen_layers_of_either_kind"): [
        (
            "stacked weights run as adapters of one",
            "        elif w.dim() == 3:\n            key.append(3)\n",
            "",
        ),
    ],
    ("operands", "segments::as_a_loop"): [
        (
            "a segment gets the gradient of the first rows",
            "of[w] if type(w)",
            "of[: w.stop - w.start] if type(w)",
        ),
    ],
    ("eager", "segments::what_a_row_drops_depends_on_its_number"): [
        (
            "an eager segment's mask begins at its own first row",
            "range(begin, begin +",
            "range(0, 0 +",
        ),
    ],
    ("dropout", "batched_gradients::per_sample_gradients"): [
        ("a seed for each sample meets a mask for all", "64))) + seed", "64))).add_(seed)"),
    ],
    ("blocks", "projections::acceptance_rule"): [
        ("dx is that of the last projection", "@ w if dx is None else dx.addmm_(dy, w)", "@ w"),
        ("a block takes the rows of the first", "else t[rows]", "else t[: rows.stop - rows.start]"),
    ],
    ("blocks", "projections::only_what_is_asked_for"): [
        ("a gradient that is not asked for is made", "[da if need else None for", "[da for"),
    ],
    ("blocks", "operator::inputs_are_never_modified"): [
        (
            "dy is written to",
            "scaled_product(dy_rows, b, s",
            "scaled_product(dy_rows.mul_(1), b, s",
        ),
    ],
    ("blocks", "unusual_operands::infinities_stay_under_float32_adapters"): [
        (
            "terms are rounded where there is no Triton",
            "first = (t.view(torch.int32) & -0x10000).view(t.dtype)",
            "first = t.to(torch.bfloat16).to(t.dtype)",
        ),
    ],
    ("blocks", "unusual_operands::float16_is_scaled_before_it_overflows"): [
        (
            "float16 products are scaled when they are rounded",
            "return _add_of(out)(out, left, right, beta=0, alpha=alpha)\n\n",
            "return (left @ right).mul_(alpha)\n\n",
        ),
    ],
    ("blocks", "unusual_operands::what_is_kept_by_dropout_is_not_scaled_early"): [
        (
            "what dropout keeps is scaled in ds",
            "(part, ones, value=kept_scale(p))",
            "(((left[rows] * kept_scale(p)) @ right).to(dx.dtype), ones)",
        ),
    ],
    ("blocks", "unusual_operands::many_rows_of_a_tiny_layer_take_few_calls"): [
        ("narrow inputs go by as few rows as wide ones", "= 1 << 18", "= 1"),
    ],
    ("library", "projections::float32_adapters_take_one_launch_for_each_low_rank_product"): [
        ("low-rank products of float32 factors take a dozen launches", ", ss, there)", ", ss)"),
    ],
    ("library", "kernels/kernels::pytorch_groups_the_wide_products_that_it_can"): [
        (
            "an expert's y is of the next one's first row",
            "grouped_mm(x, one.w.mT, segments[0])",
            "grouped_mm(x, one.w.mT, (segments[0] + 1).clamp(max=len(x)))",
        ),
        (
            "an expert's dx is of the next one's first row",
            "grouped_mm(dy, one.w, segments[0])",
            "grouped_mm(dy, one.w, (segments[0] + 1).clamp(max=len(dy)))",
        ),
        ("frozen experts lose their bias", "s is None and one.bias is not None", "False"),
    ],
    ("grouped", "kernels/kernels::pytorch_groups_the_wide_products_that_it_can"): [
        (
            "PyTorch gets an expanded gradient",
            "if not (_grouped(left) and _grouped(right)):",
            "if not _grouped(right):",
        ),
        (
            "rows lie apart as PyTorch made them",
            ", offs=ends[1:]).contiguous()",
            ", offs=ends[1:])",
        ),
    ],
    ("eager", "operator::gradcheck_and_double_backward"): [
        ("a gradient at create_graph is cut from its graph", '": create_graph', '": False'),
    ],
    ("plans", "plans::the_fastest_measured_runs_in_each_direction"): [
        ("the slowest runs", "best, why = min(", "best, why = max("),
    ],
    ("plans", "plans::a_draw_leaves_the_default"): [
        ("a draw leaves for another implementation", "< 0.98 * ", "< 1.02 * "),
    ],
    ("plans", "plans::the_environment_is_read_when_python_starts"): [
        ("an empty variable names an implementation", '") or "auto"', '", "auto")'),
    ],
    ("plans", "plans::measured_configs_reach_the_kernels"): [
        ("configs run where loads are narrow", " t.data_ptr() % 16:", " False:"),
        ("any config is run with", "if asdict(config) == fields", ""),
    ],
    ("measured", "plans::measurements_hold_for_their_bucket"): [
        ("measurements hold for one number of tokens", "m.bucketed()))", "m))"),
    ],
    ("measured", "tuning::measurements_of_other_versions_lie_in_another_file"): [
        ("measurements of other versions count", '" ".join(parts)', '" ".join(parts[:2])'),
    ],
    ("measured", "tuning::a_file_that_does_not_parse_is_ignored_with_one_warning"): [
        ("a file that is damaged stops the run", " Exception as error:", " KeyError as error:"),
    ],
    ("measured", "tuning::the_folder_of_the_user"): [
        ("~ is a folder", "return Path(folder).expanduser() /", "return Path(folder) /"),
    ],
    ("tuning", "tuning::a_phase_is_the_time_of_its_kernels"): [
        ("a GPU is idle when its time is taken", "max(LEAST_SPIN, 3 * took[name])", "LEAST_SPIN"),
    ],
    ("tuning", "tuning::ways_take_turns_and_one_that_fails_fails_alone"): [
        ("a way that fails takes the others along", "if failed is None:", "if True:"),
        (
            "ways take turns in one order",
            "chance.sample(list(rounds), len(rounds))",
            "list(rounds)",
        ),
        ("long steps are run twice", "and took[name] < SHORT", ""),
    ],
    ("tuning", "tuning::few_tokens_are_timed_with_the_host"): [
        ("few tokens are timed without the host", ", host_counts(problem.M, device))", ")"),
    ],
    ("tuning", "tuning::an_implementation_that_fails_is_left_out"): [
        ("what fails ends the tuning", "Exception as error:\n ", "KeyError as error:\n "),
    ],
    ("tuning", "tuning::a_problem_that_does_not_fit_is_left_out"): [
        ("a problem too large ends the tuning", "Exception as error:  #", "KeyError as error:  #"),
    ],
    ("tuning", "tuning::tuning_on_first_use"): [
        ("the user's generator is drawn from", "torch.Generator(device).manual_seed(0)", "None"),
    ],
    ("tuning", "tuning::tuning_on_first_use tuning::what_is_measured_is_planned_with"): [
        ("what was planned before a measurement stays", "            plans.forget()\n", ""),
    ],
    ("tuning", "tuning::a_problem_that_fails_is_tried_once"): [
        ("a problem is measured again each time", "once(problem.b", "once.__wrapped__(problem.b"),
    ],
}


def _node(short: str) -> str:
    file, *name = short.split("::")
    folder, _, file = file.rpartition("/")
    return "::".join([f"{folder or 'operator'}/test_{file}.py", *(f"test_{n}" for n in name)])


MUTANTS = [
    Mutant(what, f"fastlora/operator/{file}.py", right, wrong, " ".join(map(_node, tests.split())))
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
