"""The DPOTrainer subclass beside TRL's own on the same weights and batch: losses, gradients, references, adapters, refusals, two ranks."""

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROWS = [
    {"prompt": "What is the capital of France?", "chosen": " Paris.", "rejected": " I believe that it might be Lyon, or not."},
    {"prompt": "Two plus two equals", "chosen": " four, of course.", "rejected": " five."},
    {"prompt": "The sky is", "chosen": " blue during a clear day", "rejected": " green"},
    {"prompt": "Name a fruit:", "chosen": " apple", "rejected": " a chair is not a fruit but here it is"},
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    import copy

    return copy.deepcopy(smollm2.tokenizer)


def _small(tokenizer, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def _trainer(cls, model, reference, tokenizer, tmp_path, peft_config=None, rows=ROWS, **options):
    from datasets import Dataset
    from trl import DPOConfig

    config = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_steps=2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        **options,
    )
    return cls(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def _perturb(model, scale=0.02):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


SAME = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["hinge"]},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    {"loss_type": ["robust"], "label_smoothing": 0.2},
    {"loss_type": ["nca_pair"]},
    {"loss_type": ["bco_pair"]},
    {"loss_type": ["sppo_hard"]},
    {"loss_type": ["aot"], "label_smoothing": 0.1},
    {"loss_type": ["aot_unpaired"]},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["apo_down"]},
    {"loss_type": ["discopop"]},
    {"loss_type": ["sft"]},
    {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["sigmoid"], "use_weighting": True},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence"},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
]


@pytest.fixture(scope="module")
def side_by_side(tokenizer, tmp_path_factory):
    """TRL's trainer and ours on equal weights, built once; a case sets the options on both.

    Configurations come first: each construction resets accelerate's state, which trainers then set up.
    """
    import trl

    from llmcore.integrations.trl import DPOTrainer

    folder = tmp_path_factory.mktemp("side_by_side")
    configs = [trl.DPOConfig(output_dir=str(folder), beta=0.3, use_cpu=True, bf16=False, **options) for options in SAME]
    pair = [
        _trainer(cls, _perturb(_small(tokenizer)), _small(tokenizer), tokenizer, folder, beta=0.3, use_weighting=True)
        for cls in (trl.DPOTrainer, DPOTrainer)
    ]
    return *pair, _batch(pair[0]), configs


@pytest.mark.parametrize("case", range(len(SAME)), ids=lambda i: "-".join(str(v) for v in SAME[i].values()))
def test_losses_gradients_and_metrics_equal_trls_own(case, side_by_side):
    from llmcore.integrations.trl import loss_from_config

    *trainers, batch, configs = side_by_side
    options, config = SAME[case], configs[case]
    results = []
    for trainer in trainers:
        trainer.loss_types, trainer.loss_weights = config.loss_type, config.loss_weights or [1.0] * len(config.loss_type)
        for name in ("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting"):
            setattr(trainer, name, getattr(config, name))
        trainer.preference_loss = loss_from_config(config)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}, dict(trainer._metrics["train"])))
    (theirs, their_grads, their_metrics), (ours, our_grads, our_metrics) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, grad in their_grads.items():
        assert (grad - our_grads[name]).norm() <= 1e-4 * grad.norm() + 1e-9, name
    for name, value in their_metrics.items():
        if not (options["loss_type"] == ["sft"] and "rewards" in name) and name != "num_tokens":  # sft alone scores no reference here
            assert our_metrics[name][-1] == pytest.approx(value[-1], rel=1e-4, abs=1e-5), name


def test_smollm2_losses_equal_trls_own_to_1e_4(smollm2, tokenizer, tmp_path):
    import copy

    import trl

    from llmcore.integrations.trl import DPOTrainer, loss_from_config

    reference, policy = copy.deepcopy(smollm2.model), _perturb(copy.deepcopy(smollm2.model), 0.003)
    plain = _trainer(trl.DPOTrainer, policy, reference, tokenizer, tmp_path, rows=ROWS[1:3])
    batch = _batch(plain)
    expected = {}
    for name in ("sigmoid", "ipo", "hinge"):
        plain.loss_types = [name]
        with torch.no_grad():
            expected[name] = plain.compute_loss(plain.model, batch)
    del policy.forward, reference.forward  # TRL's head sits on the instances
    fused = _trainer(DPOTrainer, policy, reference, tokenizer, tmp_path, rows=ROWS[1:3])
    for name, value in expected.items():
        fused.args.loss_type = [name]
        fused.preference_loss = loss_from_config(fused.args)
        with torch.no_grad():
            torch.testing.assert_close(fused.compute_loss(fused.model, batch), value, rtol=1e-4, atol=1e-4)
    assert fused.preference_loss.name == "hinge"


def test_label_smoothing_acts_where_trl_drops_it(tokenizer, tmp_path):
    import trl

    from llmcore.integrations.trl import DPOTrainer
    from llmcore.losses import DPO

    ours = _trainer(DPOTrainer, _perturb(_small(tokenizer)), _small(tokenizer), tokenizer, tmp_path, label_smoothing=0.2)
    theirs = _trainer(trl.DPOTrainer, _perturb(_small(tokenizer)), _small(tokenizer), tokenizer, tmp_path, label_smoothing=0.2)
    assert ours.preference_loss == DPO(label_smoothing=0.2)
    batch = _batch(ours)
    smoothed, ignored = ours.compute_loss(ours.model, batch), theirs.compute_loss(theirs.model, batch)
    metrics = ours._metrics["train"]
    assert (smoothed - ignored).abs() > 1e-4
    assert metrics["rewards/ties"][-1] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "loss_type": ["ipo"]},
        {"label_smoothing": 0.1, "loss_type": ["hinge"]},
        {"loss_type": ["nonsense"]},
        {"loss_type": ["kto"]},
        {"loss_type": ["aot"], "use_weighting": True},
        {"loss_type": ["robust"], "label_smoothing": 0.5},
        {"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]},
    ],
    ids=str,
)
def test_options_that_would_be_ignored_raise(options):
    from trl import DPOConfig

    from llmcore.integrations.trl import loss_from_config

    with pytest.raises(ValueError):
        loss_from_config(DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options))


def test_names_of_this_library_are_accepted_and_ipo_is_explicit():
    from trl import DPOConfig

    from llmcore.integrations.trl import loss_from_config
    from llmcore.losses import RDPO, IPOMean, IPOSum

    for name, loss in (
        ("ipo", IPOMean(beta=0.2)),
        ("ipo_mean", IPOMean(beta=0.2)),
        ("ipo_sum", IPOSum(beta=0.2)),
        ("rdpo", RDPO(beta=0.2)),
    ):
        assert loss_from_config(DPOConfig(output_dir="unused", loss_type=[name], beta=0.2, use_cpu=True, bf16=False)) == loss


@pytest.mark.parametrize("precompute", [False, True])
def test_training_starts_at_ln2_and_moves(precompute, tokenizer, tmp_path):
    from llmcore.integrations.trl import DPOTrainer

    reference = None if precompute else _small(tokenizer)
    trainer = _trainer(DPOTrainer, _small(tokenizer), reference, tokenizer, tmp_path, precompute_ref_log_probs=precompute)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # the batch is the whole data set, policy == reference
    assert losses[1] < losses[0]
    assert trainer.state.log_history[0]["rewards/accuracies"] == 0.5
    assert trainer.state.log_history[0]["rewards/ties"] == 1.0


def test_a_reference_that_follows_the_policy_is_live_or_refused(tokenizer, tmp_path):
    """TR-DPO: R <- a theta + (1 - a) R. With a = 1 after every step, policy and reference agree again and each loss is ln 2."""
    from peft import LoraConfig

    from llmcore.integrations.trl import DPOTrainer

    follow = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = _trainer(DPOTrainer, _small(tokenizer), _small(tokenizer), tokenizer, tmp_path, **follow)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx([0.6931472] * 2, abs=1e-6)
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        _trainer(DPOTrainer, _small(tokenizer), None, tokenizer, tmp_path, precompute_ref_log_probs=True, **follow)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        _trainer(DPOTrainer, _small(tokenizer), None, tokenizer, tmp_path, peft_config=lora, **follow)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_are_computed_once_where_the_attention_takes_a_block_mask(attention, tokenizer, tmp_path):
    from llmcore.integrations.trl import DPOTrainer

    model = _perturb(_small(tokenizer))
    model.set_attn_implementation(attention)
    trainer = _trainer(DPOTrainer, model, _small(tokenizer), tokenizer, tmp_path)
    batch = _batch(trainer)
    shared = trainer._shared_calls(batch)
    assert shared.trunk_tokens < batch["attention_mask"].sum() < batch["input_ids"].numel()
    ours = trainer._score(trainer.model, batch)
    trainer._shared_calls = lambda inputs: None
    padded = trainer._score(trainer.model, batch)
    assert torch.equal(ours.counts, padded.counts)
    assert torch.equal(ours.is_top1, padded.is_top1)
    for name in ("logp", "entropy", "mean_logit"):
        torch.testing.assert_close(getattr(ours, name), getattr(padded, name), rtol=1e-4, atol=1e-4)
    model.config.sliding_window = 4
    del trainer._shared_calls
    assert trainer._shared_calls(batch) is None


def test_lora_trains_with_a_frozen_head_and_no_second_model(tokenizer, tmp_path):
    from peft import LoraConfig

    from llmcore.integrations.trl import DPOTrainer

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = _trainer(DPOTrainer, _small(tokenizer), None, tokenizer, tmp_path, peft_config=lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[1] < losses[0]
    assert trainer.ref_model is None
    assert not trainer.model.get_base_model().lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "place", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_on_the_head_is_refused(place, tokenizer, tmp_path):
    from peft import LoraConfig

    from llmcore.integrations.trl import DPOTrainer

    with pytest.raises(ValueError, match="lm_head"):
        _trainer(DPOTrainer, _small(tokenizer), None, tokenizer, tmp_path, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", **place))


def test_nothing_is_patched_globally_and_generation_still_works(tokenizer, tmp_path):
    import trl
    from transformers import LlamaForCausalLM

    from llmcore.integrations.trl import DPOTrainer

    before = LlamaForCausalLM.forward, trl.DPOTrainer._compute_loss
    model = _small(tokenizer)
    ids = torch.tensor([[1, 5, 9]])
    expected = model(ids).logits.detach()
    trainer = _trainer(DPOTrainer, model, _small(tokenizer), tokenizer, tmp_path)
    assert (LlamaForCausalLM.forward, trl.DPOTrainer._compute_loss) == before
    torch.testing.assert_close(trainer.model.eval()(ids).logits, expected)
    assert trainer.model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


def _rank(rank, path, reference, results):
    import torch.distributed as dist

    from llmcore.integrations.trl import install_head

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = _perturb(_small(range(300)))
    install_head(model, ("logp",))
    module = torch.nn.parallel.DistributedDataParallel(model)
    module(input_ids=reference[rank], labels=reference[rank], fused_lm_head=True).log_probs.sum().backward()
    results[rank] = {name: p.grad.clone() for name, p in model.named_parameters()}
    dist.destroy_process_group()


def test_data_parallel_synchronises_gradients_of_different_data(tmp_path):
    import torch.multiprocessing as mp

    from llmcore.integrations.trl import install_head

    ids = torch.randint(300, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_rank, args=(str(tmp_path / "store"), ids, results), nprocs=2, start_method="fork")
        first, second = results[0], results[1]
    model = _perturb(_small(range(300)))
    install_head(model, ("logp",))
    both = torch.cat([ids[0], ids[1]])
    (model(input_ids=both, labels=both, fused_lm_head=True).log_probs.sum() / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max().item())
