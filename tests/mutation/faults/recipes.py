"""Faults of the trainings."""

from tests.mutation.fault import fault

SIMGAN, DANN, REVIEWS = (f"fastda/recipes/{name}" for name in ("simgan", "dann", "reviews"))
FAULTS = (
    fault(
        "SimGAN: asks the history and does not use the answer", SIMGAN,
        "refined = self.buffer.query(refined)", "self.buffer.query(refined)",
        "test_the_discriminator_learns_from_the_historys_answer",
    ),
    fault(
        "SimGAN: the discriminator stays frozen", SIMGAN,
        "self.discriminator.requires_grad_(True)", "pass",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: the average forgets at the rate it should keep", SIMGAN,
        "lerp_(value, 1 - decay)", "lerp_(value, decay)",
        "test_the_averaged_weights_follow_slowly",
    ),
    fault(
        "SimGAN: as many steps of D as of R", SIMGAN,
        "range(self.settings.discriminator_steps)", "range(self.settings.refiner_steps)",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: one step too many of D's pre-training", SIMGAN,
        "if self.step < s.pretrain_refiner + s.pretrain_discriminator:",
        "if self.step <= s.pretrain_refiner + s.pretrain_discriminator:",
        "test_the_order_of_steps_and_who_takes_gradients",
    ),
    fault(
        "SimGAN: λ is always 1", SIMGAN,
        "settings.reg_scale, settings.kind", "1.0, settings.kind",
        "test_lambda_scales_the_regularisation",
    ),
    fault(
        "SimGAN: λ is always 1 with a ψ", SIMGAN,
        "kept, s.reg_scale, reduction", "kept, 1.0, reduction",
        "test_lambda_scales_the_regularisation",
    ),
    fault(
        "SimGAN: curves are lost when a training is resumed", SIMGAN,
        'self.step, self.curves = state["step"], state["curves"]', 'self.step = state["step"]',
        "test_resuming_is_bit_identical",
    ),
    fault(
        "DANN: the target's mean is that of the test images", DANN,
        "self.net.set_domain_mean(TARGET, pair.target_train.x)",
        "self.net.set_domain_mean(TARGET, pair.target_test.x)",
        "test_test_images_play_no_part",
    ),
    fault(
        "DANN: the criterion looks at the test images", DANN,
        "images = self.pair.target_train.x[", "images = self.pair.target_test.x[",
        "test_test_images_play_no_part",
    ),
    fault(
        "DANN: the learning rate falls more slowly than published", DANN,
        "(1 + 10 * progress) ** 0.75", "(1 + 10 * progress) ** 0.5",
        "test_rate_and_reversal_follow_the_published_schedules",
    ),
    fault(
        "DANN: the reversal never rises", f"{DANN}/train.py",
        "self.net.reverse.step()", "pass",
        "test_rate_and_reversal_follow_the_published_schedules",
    ),
    fault(
        "DANN: the best epoch's weights are not taken", DANN,
        "weights = trainer.best or trainer.averaged", "weights = trainer.averaged",
        "test_early_stopping_returns_the_weights_of_the_best_epoch",
    ),
    fault(
        "DANN: momentum is lost when a training is resumed", DANN,
        'group("momentum.").items()', 'group("nothing.").items()',
        "test_resumed_after_any_epoch_has_the_same_bits",
    ),
    fault(
        "related weights: steps of any size", DANN,
        "nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)", "pass",
        "test_a_step_with_related_weights_is_bounded",
    ),
    fault(
        "auto-encoders: masked values count as often as the others", REVIEWS,
        "noisy = scatter * kept[:, None] * kept", "noisy = scatter * kept",
        "test_denoising_layer_is_the_least_squares_solution_over_maskings",
    ),
    fault(
        "auto-encoders: every layer restores the words", REVIEWS,
        "weights = denoising_layer(codes, masked)", "weights = denoising_layer(x, masked)",
        "test_codes_are_the_words_and_every_layers_output",
    ),
    fault(
        "reviews: the domain classifier is as slow as the rest", REVIEWS,
        "DOMAIN_RATE, DOMAIN_DECAY = 30, 1.0", "DOMAIN_RATE, DOMAIN_DECAY = 1, 0.0",
        "test_dann_makes_the_domains_alike_and_learns_the_labels",
    ),
    fault(
        "reviews: the scale whose way back is worst", REVIEWS,
        "(accuracy, scale) > best[:2]", "(accuracy, scale) < best[:2]",
        "test_reverse_validation_takes_the_scale_whose_way_back_is_best",
    ),
    fault(
        "reviews: the way back learns other labels than the way there gave", REVIEWS,
        "hold_out(other, net.predict(other), seed)", "hold_out(other, y, seed)",
        "test_reverse_validation_takes_the_scale_whose_way_back_is_best",
    ),
    fault(
        "reviews: sources that are done are trained once more", REVIEWS,
        "if (representation, d.name) not in done", "if True",
        "test_resumed_run_ends_with_the_same_rows",
    ),
    fault(
        "split: one image of every class in both parts", "fastda/recipes/common",
        "test.append(members[cut:])", "test.append(members[cut - 1 :])",
        "test_mnistm_shares_neither_digits_nor_photos_between_training_and_test",
    ),
)  # fmt: skip
