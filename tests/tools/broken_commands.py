# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the command line, and what must notice each."""

from broken_copies import Mutant

# By file and the test that must notice: what, right, wrong.
COPIES = {
    ("trainer", "finetune::test_a_run_that_diverges_says_so"): [
        ("losses that are not finite are trained on", "if not math.isfinite(loss):", "if False:"),
    ],
    ("trainer", "finetune::test_the_speed_is_that_of_all_steps_and_of_nothing_else"): [
        ("seconds are the last session's", '-self.state.log_history[-1]["train_runtime"]', "0.0"),
    ],
    ("trainer", "finetune::test_what_fails_in_a_step_is_no_damaged_checkpoint"): [
        ("what fails is always the checkpoint", "or trainer.progress.begun", "or False"),
    ],
    ("trainer", "finetune::test_prompts_that_are_too_long_leave_fewer_examples_than_a_step_has"): [
        ("what was left out is counted on", "= counts[0] >= s", "= len(examples) >= s"),
    ],
    ("__main__", "finetune::test_a_missing_dependency_says_what_to_install"): [
        ("what the package lacks is the user's to install", 'startswith("fastlora")', "isspace()"),
    ],
    ("models", "finetune::test_a_tokenizer_without_a_token_for_padding_or_the_end"): [
        ("every tokenizer has an end", "or tokenizer.convert_ids_to_tokens(0)", ""),
    ],
    ("finetune", "finetune::test_a_users_mistake_is_one_line_and_exit_code_2"): [
        ("a dropout of 1 is taken", 'dropout", type=number(float, 0, 1)', 'dropout", type=float'),
    ],
    ("finetune", "data::test_the_seed_decides_the_order"): [
        ("the order is always one", ': s.seed, "data_seed": s.seed', ': 0, "data_seed": 0'),
    ],
    ("data", "data::test_an_answer_is_what_generation_would_give"): [
        ("what follows a turn's end is learnt", "].rstrip()", "]"),
        ("an answer begins as a text does", "if ids[:start] != prompt:", "if True:"),
        ("a token reaches into the answer", "if ids[:start] != prompt:", "if False:"),
    ],
    ("data", "data::test_a_bad_line_is_named"): [
        ("turns under any key are a talk", 'elif keys == ["messages"]:', "elif len(keys) == 1:"),
        ("a terminal obeys what a file holds", "errors='replace')!r}", "errors='replace')}"),
    ],
    ("ranks", "ranks::test_every_trial_has_a_folder_of_its_own"): [
        ("long names are cut to one", "zlib.crc32(repr(targets).encode())", "0"),
    ],
    ("__main__", "finetune::test_ctrl_c_leaves_a_run_that_goes_on"): [
        ("Ctrl-C ends well", "return 130", "return 0"),
    ],
    ("finetune", "finetune::test_ctrl_c_leaves_a_run_that_goes_on"): [
        ("a half checkpoint is gone on from", "with contextlib.suppress(ValueError):", "if True:"),
    ],
    ("finetune", "finetune::test_other_settings_and_other_data_are_refused"): [
        ("a run goes on with other data", "Path(s.data).read_bytes()", 'b""'),
    ],
    ("data", "data::test_answers_and_whole_texts_are_learnt"): [
        ("later answers of a talk are left out", "for i in answers]", "for i in answers[:1]]"),
        ("answers have no question", '"prompt": talk[:i]', '"prompt": talk[i - 1 : i]'),
        ("every template writes histories alike", "if not whole.startswith(asked):", "if False:"),
    ],
    ("trainer", "launch::test_two_processes_go_on_from_one"): [
        ("the data's last examples are a step", "= counts[0] >= s.batch_size", "= False"),
        (
            "one process's tokens are counted",
            'self.accelerator.reduce(learnt.sum(), "sum")',
            "learnt.sum()",
        ),
    ],
    ("trainer", "finetune::test_a_run_that_is_stopped_at_its_end_makes_no_step_too_many"): [
        ("a run goes on from its end", "state.global_step < state.max_steps", "True"),
    ],
    ("trainer", "finetune::test_peft_loads_the_adapter_with_the_loss_that_was_measured"): [
        ("held-out loss is the mean of batches", ".item() * learnt", ".item()"),
    ],
    ("ranks", "ranks::test_what_is_tried_and_taken_and_why"): [
        ("a gain that seeds do not agree on is one", " and self.gain > self.noise", ""),
    ],
    ("info", "tune::test_info_refuses_what_layers_refuse"): [
        ("info takes any name", "return isinstance(error, RuntimeError), f", "return True, f"),
    ],
}
MUTANTS = [
    Mutant(what, f"fastlora/{folder}{file}.py", right, wrong, f"commands/test_{test}")
    for (file, name), copies in COPIES.items()
    for test in [name.replace("::", ".py::")]
    for folder in ["" if file == "__main__" else "commands/"]
    for what, right, wrong in copies
]
