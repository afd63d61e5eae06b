"""Every option and its default. Other configs import this and change a few.

This is a model of a few hundred thousand parameters for a laptop.

  python -m moe_jax.main --config=configs/base.py --workdir=runs/base
"""

from ml_collections import ConfigDict

from moe_jax.run import config as config_lib


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # initial parameters, order of the data, noise of the router
  # Devices along data, fsdp, expert, tensor; -1: all that are left.
  c.mesh = (-1, 1, 1, 1)
  c.writers = ()  # beside metrics.jsonl: "tensorboard", "wandb"
  c.plugins = ()  # your folders with routers/NAME.py, balancers/NAME.py, ...

  # Weights to start with: a run's work directory, one of its checkpoints, a folder
  # of moe_jax.upcycle, published weights, or hf:ORG/NAME of the Hugging Face hub.
  # None: random ones.
  c.init_from = None
  # Parts of the model that begin new all the same, whether or not they would fit:
  # router, experts, shared, latent, cheap, attention, dense, norm, embedding, head.
  # All others have to fit.
  c.init_new = ()
  # How experts are made of the weights of a dense model, or of fewer experts, as
  # {"method": "copy"}: the flags of moe_jax.upcycle. {}: the model is the same.
  c.upcycle = ConfigDict()
  c.task = ConfigDict({"name": "next_token"})  # a file of moe_jax/tasks

  c.data = ConfigDict()
  # A dataset of moe_jax/data/datasets, of a plugin, any that TFDS knows, or
  # hf:ORG/NAME or hf:ORG/NAME/FILES of the Hugging Face hub.
  c.data.name = "python_sources"
  # Folder of a prepared TFDS dataset; or a file, a folder or a pattern of texts.
  c.data.dir = None
  c.data.text_feature = "text"  # the feature of an example that is read
  c.data.domain_feature = "domain"  # the feature with its domain, if any
  c.data.skip_not_utf8 = False  # leave out texts of a folder that are not UTF-8
  # Instead of that one: {label: {"name": ..., "weight": ..., "dir": ...}}, and the
  # features, if they are others; in translation also source, target, prefix,
  # source_begin and target_begin.
  c.data.mixture = ConfigDict()
  c.data.tokenizer = "bytes"  # or a tokenizer.json, or a SentencePiece .model
  c.data.separate_documents = True  # no attention or loss across their ends
  c.data.cache_dir = None  # None: ~/.cache/moe_jax
  c.data.seq_len = 256  # tokens in a sequence
  c.data.batch_size = 16  # sequences in a step, over all devices

  c.model = ConfigDict()
  c.model.name = "decoder"  # a file of moe_jax/models
  # None: that of the data's tokenizer.
  c.model.vocab_size = None
  c.model.d_model = 128  # width of the residual stream
  c.model.num_layers = 4  # prefix plus a whole number of patterns
  # Kinds of the first layers: "dense", "moe", "moe+dense", or "moe@VARIANT".
  c.model.prefix = ()
  c.model.pattern = ("moe",)  # kinds of the layers that repeat after them
  c.model.num_heads = 4  # query heads
  c.model.num_kv_heads = 2  # key and value heads; divides num_heads
  c.model.head_dim = 32  # width of a head, even
  c.model.d_ff = 512  # hidden width of dense layers
  c.model.activation = "swiglu"  # of dense layers: relu, gelu, swiglu, geglu
  c.model.rope_theta = 10_000.0  # base of the rotary frequencies
  # More options of attention, and its "name", a file of moe_jax/models/attention;
  # without a name it is "grouped".
  c.model.attention = ConfigDict()
  # {name: keys} of layers "dense@name", "moe@name" that differ in them: options
  # of attention, d_ff, activation, and "moe": any keys of model.moe.
  c.model.variants = ConfigDict()
  c.model.norm = "rms"  # or "layer", or "layer_bias"
  c.model.norm_eps = 1e-6  # added to the mean square
  c.model.tie_embeddings = True  # output layer = transposed embedding
  c.model.scale_embedding = True  # times sqrt(d_model)
  # Vectors over sqrt(d_model) before the output layer (T5, where it is tied).
  c.model.scale_output = False
  # Variance of the embedding's first numbers (T5: 1); None: 1 / d_model.
  c.model.embedding_variance = None
  c.model.positions = "none"  # added to embeddings; or "sinusoidal"
  # V of an embedding that the encoder of an encoder_decoder has of its own; None:
  # it has the decoder's.
  c.model.source_vocab_size = None
  # The keys above are the layers of a decoder. Where there is an encoder, these are
  # the keys in which its layers differ (num_layers, prefix, pattern, moe, ...).
  c.model.encoder = ConfigDict()
  c.model.use_bias = False  # biases in dense layers
  c.model.init_scale = 1.0  # variance of weights times fan-in (Switch: 0.1)
  c.model.dropout = 0.0  # of what sublayers add, in training (T5)
  # The dropout of attention's weights, and of hidden units; None: as dropout.
  c.model.attention_dropout = c.model.hidden_dropout = None
  # How the model "vision" reads images: patch, pooling, positions, d_head and
  # head_bias, see moe_jax/models/parts/image.py.
  c.model.image = ConfigDict()
  # How the model "diffusion" reads videos: patch and num_waves, see
  # moe_jax/models/parts/video.py.
  c.model.video = ConfigDict()
  # Recomputed in the backward pass: "none", "dispatch" (blocks without the
  # exchange between devices), "block" (whole blocks).
  c.model.remat = "none"
  c.model.dtype = "float32"  # of activations; parameters are float32
  c.model.allow_noncausal = False  # let routing look at later tokens

  moe = c.model.moe = ConfigDict()
  moe.num_experts = 8  # E, routed experts of a layer
  moe.top_k = 2  # K, experts per token
  moe.d_expert = 128  # F, hidden width of one expert
  moe.num_shared_experts = 0  # experts that every token passes, as one wide one
  moe.shared_gate = False  # the shared experts times sigmoid(x w) (Qwen2-MoE)
  # Experts that cost next to nothing, behind the others (MoE++, LongCat-Flash):
  moe.num_zero_experts = 0  # of output 0
  moe.num_copy_experts = 0  # of output x
  moe.num_constant_experts = 0  # of a learnt mean of x and a vector
  moe.real_experts = None  # networks of a token on average; a bias moves there
  # Width of the experts' rows, with projections there and back; None: d_model.
  moe.d_latent = None
  moe.activation = "swiglu"  # of experts: relu, gelu, swiglu, geglu
  moe.use_bias = False  # biases in experts
  moe.expert_dropout = None  # of hidden units; None: model.hidden_dropout
  moe.equal_experts = False  # all of a layer begin equal (V-MoE)
  moe.init_scale = 1.0  # variance of expert weights times fan-in (Switch: 0.1)
  moe.tokens_per_group = "sequence"  # or a number, or "8 sequences"
  # Slots over balanced load; None: nothing is dropped, with the dispatcher sorted.
  moe.capacity_factor = 2.0
  # Outside of training; None: the same; or "dropless".
  moe.eval_capacity_factor = None
  moe.capacity = None  # slots in a group of any size; None: by the factors
  moe.expert_buckets = None  # None: one per expert
  moe.capacity_rounding = "floor"  # of slots: floor, ceil, round
  moe.capacity_multiple = 1  # slots are rounded up to a multiple of it
  moe.min_capacity = 0  # and raised to this if they are fewer
  # On a mesh: "all_to_all" sends rows to the devices of their experts,
  # "all_gather" sends all tokens to all devices of the expert axis.
  moe.exchange = "all_to_all"
  # Kernel for ragged rows: reference, cpu, gpu, tpu, or one candidate of gpu
  # alone, such as "gpu:triton". None: the platform's.
  moe.grouped_matmul = None
  # A file of moe_jax/moe/routers and its options.
  moe.router = ConfigDict({"name": "top_k"})
  # A file of moe_jax/moe/dispatchers and its options.
  moe.dispatcher = ConfigDict({"name": "gather", "order": "token"})
  # Any number of files of moe_jax/moe/balancers, by a label of yours.
  moe.balancers = ConfigDict()

  c.optim = ConfigDict()
  # A file of moe_jax/training/optimizers and its options.
  c.optim.optimizer = ConfigDict({"name": "adamw"})
  c.optim.learning_rate = 3e-3  # at the end of the warm-up
  c.optim.warmup_steps = 20  # linear
  c.optim.schedule = "cosine"  # after it: constant, cosine, wsd, rsqrt
  # wsd: length of the final decay; rsqrt: the step from which it falls.
  c.optim.decay_steps = 0
  c.optim.final_fraction = 0.1  # of the learning rate, at the last step
  # Decoupled; not on scales, biases and embedding, and not with sgd.
  c.optim.weight_decay = 0.1
  # Factors by part of the model: router, experts (the routed ones), shared, latent,
  # cheap, attention, dense, norm, embedding, head; the rest is what is not named.
  # 0: it stays as it is.
  parts = {"router": 1.0, "experts": 1.0, "rest": 1.0}
  c.optim.learning_rate_factors = ConfigDict(parts)
  c.optim.weight_decay_factors = ConfigDict(parts)
  # {part: steps in which its learning rate rises from 0 to that of the others}.
  c.optim.part_warmup_steps = ConfigDict()
  c.optim.clip_norm = 1.0  # largest norm of the gradient; None: no clipping

  c.train = ConfigDict()
  c.train.num_steps = 300  # optimizer steps
  # Decay of an exponential moving average of the parameters, evaluated beside
  # them; None: none.
  c.train.ema = None
  c.train.accumulation = 1  # micro-batches in a step; divides data.batch_size
  # On a mesh, add gradients of experts up over data and fsdp once a step and not
  # in every micro-batch: less is sent, and more memory needed.
  c.train.reduce_experts_once = False
  c.train.log_every = 10  # steps between lines of metrics.jsonl
  # Steps between its lines with the load of every expert; 0: none.
  c.train.loads_every = 100
  # On a mesh, compare a layer with that of one device before the first step.
  c.train.check_mesh = True
  # Any number of files of moe_jax/training/hooks, by a label of yours, each with
  # its options and every, the steps between its calls.
  c.train.hooks = ConfigDict()
  c.train.profile_steps = ()  # (first, end): a trace in WORKDIR/profile
  c.train.max_skipped_in_a_row = 10  # steps not finite, before the run stops

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps; 0: at the end, and when it is stopped
  c.checkpoint.keep_last = 3  # the newest ones that are kept
  c.checkpoint.keep_every = None  # keep those of multiples of this step too

  c.eval = ConfigDict()
  c.eval.every = 0  # steps between evaluations; 0: at the end only
  c.eval.batch_size = 16  # sequences
  c.eval.batches_per_domain = None  # None: all
  return config_lib.locked(c.to_dict())
