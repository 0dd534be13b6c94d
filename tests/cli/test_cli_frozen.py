"""The options and the keys, written down: adding one is a decision, and it shows here.

A variation of a run is a recipe or a key. An option is only for what does not decide the outcome.
"""

from fastkd.cli.arguments import parsers
from fastkd.losses.base.registry import term_names
from fastkd.recipe.printing import valid_keys

OPTIONS = {
    "train": {
        "--config",
        "--dry-run",
        "--jobs",
        "--launcher",
        "--print-config",
        "--resume",
        "--sweep",
        "--together",
        "--verbose",
    },
    "compare": {
        "--jobs",
        "--latex",
        "--launcher",
        "--markdown",
        "--seeds",
        "--sweep",
        "--together",
        "--verbose",
    },
    "table": {"--latex", "--markdown"},
    "report": {"--figures", "--formats", "--leaderboard", "--list", "--out", "--predict"},
    "eval": {"--weights"},
    "predict": {"--out"},
    "export": {
        "--check",
        "--dynamic-batch",
        "--force",
        "--format",
        "--fuse",
        "--half",
        "--no-fuse",
        "--normalize",
        "--opset",
        "--out",
        "--push",
        "--weights",
    },
    "data": {"--json", "--out", "--quality", "--shrink"},
    "bench": {"--seconds"},
    "cache": {"--config", "--epochs", "--out"},
    "models": {"--input", "--json"},
    "cheapen": {"--depth", "--where", "--input"},
    "latency": {
        "--batch",
        "--classes",
        "--json",
        "--layers",
        "--on",
        "--read",
        "--script",
        "--size",
        "--threads",
        "--weights",
    },
    "compress": {
        "--batch",
        "--data",
        "--draws",
        "--dry-run",
        "--keep",
        "--on",
        "--out",
        "--seeds",
        "--short-epochs",
        "--stages",
        "--target",
        "--threads",
        "--weights",
    },
    "recipes": {"--json"},
    "losses": set(),
    "doctor": {"--batch", "--blocks", "--input", "--json", "--precision"},
}

KEYS = """
name description seed epochs epoch_factor batch_size accumulate precision compile channels_last
device deterministic out ema sync_bn save_steps eval_epochs max_skips tensorboard
track track_group report.record
data.name data.root data.backend data.image_size data.download data.train_limit data.workers
data.mean data.std data.drop_last data.eval_resize data.eval_crop data.eval_interpolation
data.eval_mode data.val_share data.val_seed data.exif data.alpha data.white data.max_pixels
data.on_bad data.labels data.seed data.image_dir data.label_dir data.classes_file data.multiple
data.label_stride data.tune_share
augment.crop augment.padding augment.pad_mode augment.flip augment.xprime
augment.interpolation augment.policy augment.erasing augment.repeats augment.scale augment.window
augment.randaugment.space augment.randaugment.operations augment.randaugment.magnitude
augment.randaugment.spread
augment.mixup augment.cutmix augment.mix_share augment.sizes
augment.cycle
augment.pick.criterion augment.pick.temperature augment.pick.pool augment.pick.share
augment.pick.images augment.pick.update_statistics
student.name student.width student.block student.shortcuts student.stem student.dropout
student.kernels student.drop_path student.blocks student.depth
student.weights student.weights_key student.pretrained student.new_head student.frozen
teacher.name teacher.width teacher.block teacher.shortcuts teacher.stem teacher.dropout
teacher.kernels teacher.drop_path teacher.blocks teacher.depth
teacher.weights teacher.weights_key teacher.pretrained teacher.new_head teacher.frozen
teacher.train teacher.epochs
teacher.lr teacher.seed teacher.resolution teacher.mean teacher.std teacher.class_map
teacher.min_accuracy teacher.precision teacher.compile teacher.ensemble
teacher.cache teacher.cache_format teacher.cache_top teacher.cache_maps
teacher.ensemble.0.name teacher.ensemble.0.width teacher.ensemble.0.block
teacher.ensemble.0.shortcuts teacher.ensemble.0.stem teacher.ensemble.0.dropout
teacher.ensemble.0.weights teacher.ensemble.0.weights_key teacher.ensemble.0.pretrained
teacher.ensemble.0.new_head teacher.ensemble.0.kernels teacher.ensemble.0.drop_path
teacher.ensemble.0.blocks teacher.ensemble.0.depth
teacher.ensemble.0.frozen teacher.ensemble.0.train
teacher.ensemble.0.epochs teacher.ensemble.0.lr teacher.ensemble.0.seed
teacher.ensemble.0.resolution teacher.ensemble.0.mean teacher.ensemble.0.std
teacher.ensemble.0.class_map teacher.ensemble.0.min_accuracy teacher.ensemble.0.precision
teacher.ensemble.0.compile
optim.name optim.impl optim.lr optim.momentum optim.nesterov optim.weight_decay optim.decay_norms
optim.schedule optim.milestones optim.gamma optim.power optim.warmup_epochs optim.clip_norm
baseline.lrs
encoder.epochs encoder.label_stride encoder.class_weights
losses.bce.weight losses.bce.label_smoothing losses.bce.target_threshold
losses.ce.weight losses.ce.label_smoothing losses.ce.class_weights
losses.kd.weight losses.kd.ce_weight losses.kd.temperature losses.kd.label_smoothing losses.kd.views
losses.kd.xprime_target losses.kd.standardize losses.kd.class_weights
losses.mixed_ce.weight
losses.ab.weight losses.ab.pairs losses.ab.margin
losses.at.weight losses.at.pairs losses.at.form
losses.cc.weight losses.cc.pairs losses.cc.gather losses.cc.dim
losses.crd.weight losses.crd.pairs losses.crd.dim losses.crd.negatives losses.crd.temperature
losses.crd.momentum
losses.cwd.weight losses.cwd.pairs losses.cwd.temperature losses.cwd.connector
losses.fitnet.weight losses.fitnet.pairs
losses.fsp.weight losses.fsp.pairs
losses.ft.weight losses.ft.pairs losses.ft.rate
losses.mgd.weight losses.mgd.pairs losses.mgd.mask_ratio
losses.nst.weight losses.nst.pairs
losses.pkt.weight losses.pkt.pairs losses.pkt.gather
losses.rkd.weight losses.rkd.pairs losses.rkd.gather losses.rkd.distance_weight
losses.rkd.angle_weight
losses.sp.weight losses.sp.pairs losses.sp.gather
losses.vid.weight losses.vid.pairs losses.vid.variance
losses.soft_ce.weight losses.soft_ce.temperature losses.soft_ce.view
losses.dkd.weight losses.dkd.alpha losses.dkd.beta losses.dkd.temperature losses.dkd.warmup_epochs
losses.dkd.standardize
losses.dist.weight losses.dist.temperature losses.dist.gather losses.dist.view
losses.reviewkd.weight losses.reviewkd.student losses.reviewkd.teacher losses.reviewkd.max_width
losses.reviewkd.warmup_epochs
losses.simkd.weight losses.simkd.student losses.simkd.teacher losses.simkd.factor
losses.jointrd.weight losses.jointrd.feature_weight losses.jointrd.stages losses.jointrd.form
losses.jointrd.feature losses.jointrd.eta_epochs losses.jointrd.eta_end
losses.stage_mse.weight losses.stage_mse.pairs losses.stage_mse.reduction
losses.stage_mse.eta_epochs losses.stage_mse.eta_end
losses.discriminator.weight losses.discriminator.mode losses.discriminator.hidden
losses.discriminator.last_relu losses.discriminator.lr_rule losses.discriminator.view
"""


def test_commands_and_options():
    _, commands = parsers()
    # argparse lists its options nowhere else.
    found = {
        name: {flag for flag in parser._option_string_actions if flag not in ("-h", "--help")}
        for name, parser in commands.items()
    }
    assert found == OPTIONS


def test_keys():
    assert sorted(valid_keys(term_names())) == sorted(KEYS.split())
