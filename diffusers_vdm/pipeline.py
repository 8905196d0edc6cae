"""The pipeline: sample images with our schedulers or those of diffusers."""

import inspect
import math
import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

# diffusers finds the classes of a saved pipeline only in modules that are already imported, such as schedulers
from . import (
    call_arguments,
    components,
    denoiser,
    diffusion,
    multiscale,
    noise_schedules,
    repository,
    schedulers,
    text_unet,
    unet,
)
from .condition_arguments import batch_of_conditions, conditions_of_call, negative_batch, prompt_conditions
from .diffusion import Generators
from .editing import Edit, checked_edit
from .gamma_scheduler import GammaScheduler, best_timesteps_of
from .guidance import GuidedNetwork, checked_scale, guided_network
from .image_flow import ImageFlowMixin
from .multiscale import VDMMultiscale2DModel
from .noise_schedules import NoiseSchedule
from .text_unet import VDMUNet2DConditionModel
from .texts import NULL_TEXT
from .typed_config import TypedConfig
from .unet import VDMUNet2DModel

# diffusers reads these annotations: old versions need `Union`, not strings or `X | Y`; `from_pipe` needs exact classes
_Network = Union[VDMUNet2DModel, VDMMultiscale2DModel, VDMUNet2DConditionModel, UNet2DModel]  # noqa: UP007
_OfTransformers = Union[object, None]  # noqa: UP007  not imported, because most models have no text encoder
if TYPE_CHECKING:
    _Schedule = NoiseSchedule | None
else:
    _Schedule = Union[(*(getattr(noise_schedules, name) for name in components.NOISE_SCHEDULES), None)]

_MODULES: dict[str, Any] = {"noise_schedules": noise_schedules, "schedulers": schedulers, "unet": unet,
                            "multiscale": multiscale, "text_unet": text_unet}  # fmt: skip
_OURS: tuple[type, ...] = tuple(getattr(_MODULES[module], name) for name, module in components.MODULE_OF.items())
_NO_PICKLES = "safe_serialization must be True, got False: pickled weights can run code when they are loaded."
_REFUSED: dict[str, str] = {
    "custom_pipeline": "VDMPipeline runs no code from a repository; DiffusionPipeline.from_pretrained does",
    "proxies": "set the environment variable HTTPS_PROXY",
    "use_onnx": "VDMPipeline reads only safetensors",
    "dduf_file": "VDMPipeline reads only safetensors",
    "subfolder": "a pipeline is at the root; use the classes of the components to load them from a subfolder",
}


class VDMPipeline(ImageFlowMixin, TypedConfig, DiffusionPipeline):
    """Image generation with a VDM or a DDPM, unconditional or conditioned on classes, vectors or images.

    Args:
        unet ([`VDMUNet2DModel`], [`VDMMultiscale2DModel`], [`VDMUNet2DConditionModel`] or `UNet2DModel`): the network.
        scheduler ([`VDMScheduler`], [`LinearBetaScheduler`], or a scheduler of diffusers): the sampler.
        noise_schedule ([`NoiseSchedule`], *optional*): the trainable γ(t), stored so that training can continue from a
            saved pipeline. Sampling only uses the scheduler's table of γ.
        num_levels (`int`, defaults to 256): number of levels of the training data.
        text_encoder, tokenizer (`transformers.PreTrainedModel`, `PreTrainedTokenizerBase`, *optional*): embed texts,
            for a network that is conditioned on them.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["noise_schedule", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: _Network,
        scheduler: SchedulerMixin,
        noise_schedule: _Schedule = None,
        num_levels: int = 256,
        text_encoder: _OfTransformers = None,
        tokenizer: _OfTransformers = None,
    ):
        super().__init__()
        if not 2 <= num_levels <= 256:
            raise ValueError(f"num_levels must be within [2, 256] for 8-bit images, got {num_levels}.")
        for timesteps in (scheduler, noise_schedule):
            if isinstance(timesteps, GammaScheduler | NoiseSchedule):
                prediction_type = timesteps.config.get("prediction_type", "epsilon")
                denoiser.check_network(unet, timesteps, prediction_type, num_levels)
        if (text_encoder is None) != (tokenizer is None):
            missing, given = ("text_encoder", "tokenizer") if text_encoder is None else ("tokenizer", "text_encoder")
            raise ValueError(f"{missing} must be given with {given}, got None.")
        modules = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(unet=unet, scheduler=scheduler, noise_schedule=noise_schedule, **modules)
        self.register_to_config(num_levels=num_levels)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "VDMPipeline":
        """Loads a pipeline from a folder or from the Hub, without running or unpickling any of its files.

        It downloads only the JSON and safetensors files that it needs, all from one commit, and compares them with the
        hashes that the Hub lists. Before it loads anything, it rejects file names outside the folder, pickled weights,
        safetensors headers that are too long or do not match their file, classes of modules that are not imported, and
        code that diffusers would run. It does not download or read other code or pickles in a repository, and
        `trust_remote_code` has no effect. Components passed as arguments (`unet=…`) are not downloaded or checked.

        Diffusers itself, in `DiffusionPipeline.from_pretrained` or for a single component
        (`VDMUNet2DModel.from_pretrained`), falls back to `.bin` files if there are no safetensors files
        (`use_safetensors=True` forbids that), and reads them with `weights_only=True`. It runs code only with
        `trust_remote_code=True`, except that 0.35.1 runs a component's code in a local folder, and a None.py, without
        it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or `"user/name"` on the Hub.
            revision (`str`, *optional*): a branch, a tag, a commit or `"refs/pr/1"`.
            variant (`str`, *optional*): the variant of the weights, such as `"fp16"` or `"ema"`. At least one
                component must have it; the others are loaded without a variant.
            token (`str` or `bool`, *optional*): the token for private repositories, or `False` to send none.
            cache_dir, force_download, local_files_only, torch_dtype (dtype), device_map, …: as in
                [`DiffusionPipeline.from_pretrained`]. If the Hub does not answer, the cache is used, with a warning.
            unet, scheduler, noise_schedule, num_levels: replace the saved ones.

        Returns: `VDMPipeline`, in evaluation mode.
        Raises: `OSError` for files that are missing, inaccessible or damaged; `ValueError` for rejected content.
        """
        for name, fix in _REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"{name} must not be given, got {kwargs[name]!r}: {fix}.")
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors must not be False: other weights are pickles, which can run code.")
        variant = kwargs.get("variant")
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise ValueError(f"variant must consist of letters, digits, '_' and '-', got {variant!r}.")
        if not os.path.isdir(pretrained_model_name_or_path):
            repository.check_repository_name(os.fspath(pretrained_model_name_or_path))
        else:
            folder = Path(pretrained_model_name_or_path)
            where = os.fspath(pretrained_model_name_or_path)
            names = repository.names_in(folder)
            if repository.INDEX not in names:
                raise OSError(f"{where} has no {repository.INDEX}: it is not a pipeline.")
            repository.check_files(folder, cls._needed_files(folder, names, where, kwargs), where)
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """Downloads the files for `from_pretrained` into the cache, checks them, and returns their folder.

        It replaces diffusers' method, which rejects components of other packages (diffusers issue 6563).
        """
        where = str(pretrained_model_name)
        given = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
        options = {name: kwargs[name] for name in given if kwargs.get(name) is not None}

        def choose(folder: Path, names: Collection[str]) -> list[str]:
            return cls._needed_files(folder, names, where, kwargs)

        folder = repository.fetch(where, choose, **options)
        # from the names in the cache, which may hold more files of this commit from other loads
        files = cls._needed_files(folder, repository.names_in(folder), where, kwargs)
        repository.check_files(folder, files, where)
        return str(folder)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As [`DiffusionPipeline.save_pretrained`], but writes nothing that `from_pretrained` would reject.

        Raises: `ValueError` for pickles (`safe_serialization=False`) and formats other than safetensors.
        """
        if not safe_serialization:
            raise ValueError(_NO_PICKLES)
        if kwargs.get("use_flashpack"):
            raise ValueError("use_flashpack must be left out: VDMPipeline reads only safetensors.")
        super().save_pretrained(
            save_directory, True, variant=variant, max_shard_size=max_shard_size, push_to_hub=push_to_hub, **kwargs
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        include_code: bool = False,
        run_dir: str | os.PathLike | None = None,
        license: str | None = None,
    ) -> Any:
        """As [`DiffusionPipeline.push_to_hub`], with a model card of the measured results.

        A card that was edited on the Hub is not overwritten. All files are prepared first and uploaded in one commit.

        Args (additions):
            include_code (`bool`, defaults to `False`): add this package's code, so that the repository also loads with
                `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` if the package is not installed.
            run_dir (`str` or `os.PathLike`, *optional*): the folder of the run that this pipeline was loaded from; its
                numbers, options, report and pictures are uploaded and included in the card.
            license (`str`, *optional*): the Hub's identifier of the license, such as `"apache-2.0"`.

        Returns: the Hub's `CommitInfo`.
        Raises: `ValueError` for a pipeline that is not that of `run_dir`, for pickles (`safe_serialization=False`) and
            for a `subfolder`; `OSError` if the Hub rejects the upload.
        """
        from .sharing.publish import publish

        if subfolder is not None:
            raise ValueError(
                f"subfolder must not be given, got {subfolder!r}: a pipeline is at the root of its repository; push "
                "it to a separate repository."
            )
        if not safe_serialization:
            raise ValueError(_NO_PICKLES)
        arguments = {"include_code": include_code, "run_dir": run_dir, "license": license, "variant": variant}
        arguments |= {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return publish(self, repo_id, **arguments)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As [`ConfigMixin.load_config`], with our classes mapped to our modules, whatever module the file names."""
        loaded = super().load_config(*args, **kwargs)
        if isinstance(loaded, tuple):
            return cls._canonical(loaded[0]), *loaded[1:]
        return cls._canonical(loaded)

    @staticmethod
    def _canonical(index: dict[str, Any]) -> dict[str, Any]:
        return repository.canonical_index(index, {ours.__name__: ours.__module__ for ours in _OURS})

    @classmethod
    def _needed_files(cls, folder: Path, names: Collection[str], where: str, kwargs: dict[str, Any]) -> list[str]:
        """The files to load out of `names`, those of a folder or repository; `folder` holds its `model_index.json`."""
        index = cls._canonical(repository.read_json(folder / repository.INDEX, f"{repository.INDEX} of {where}"))
        expected, _ = cls._get_signature_keys(cls)
        needed = [name for name in expected if name not in kwargs]
        classes = repository.component_classes(index, needed, names, where)
        return repository.needed_files(names, classes, kwargs.get("variant"), where)

    @property
    def device(self) -> torch.device:
        """The device of the network; diffusers would use that of the first module by name, the noise schedule."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network; noise schedules stay in float32."""
        return self.unet.dtype

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current or last call; a callback may set `_guidance_scale` for the next steps."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators | tuple[torch.Generator, ...] = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        timesteps: list[float] | Literal["best"] | None = None,
        latents: torch.Tensor | None = None,
        decode: str = "mode",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VDMPipeline", int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance: torch.nn.Module | None = None,
        guider: Any = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        num_resamples: int = 1,
        cond_vectors: Any = None,
        cond_images: torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images with the scheduler's steps, and decodes the last latent through p(x | z_0).

        Args:
            batch_size (`int`, *optional*): number of images; defaults to the number implied by `class_labels`, or 1.
            num_inference_steps (`int`, *optional*, defaults to 250): steps; more steps are slower and more accurate.
            generator (`torch.Generator` or a list or tuple of `batch_size` of them, *optional*): with a list, each
                image depends only on its own generator, whatever the batch.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): one class for all images, or one for each.
            timesteps (`list` or `"best"`, *optional*): custom decreasing timesteps instead of `num_inference_steps`,
                for schedulers that support them; or `"best"`, the `num_inference_steps` timesteps with the best bound,
                for our schedulers with a calibration, see [`calibrate`].
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): z_1 to start from, standard normal.
            decode (`"mode"` or `"sample"`, defaults to `"mode"`): the most probable level of p(x | z_0), or a sample.
            output_type (`"pil"`, `"np"`, `"pt"` or `"latent"`, defaults to `"pil"`):
                PIL images; arrays `(B, H, W, C)` or tensors `(B, C, H, W)` of the levels k/(num_levels − 1) in [0, 1];
                or z_0 without decoding.
            return_dict (`bool`, defaults to `True`): return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipe, step, timestep, tensors)` after every
                step; may return a dict with new `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): names of the tensors that the callback gets,
                defaults to `["latents"]`.
            num_images_per_prompt (`int`, defaults to 1): images for each of `class_labels`; images of one label are
                consecutive. `batch_size`, if given, is the total number of images.
            guidance_scale (`float`, defaults to 1.0): w in ε̂ = ε̂_null + w (ε̂_c − ε̂_null); 1 is the model itself, 0 the
                model without `class_labels`. Needs a network with a null class, or `autoguidance`.
            guidance_interval (`tuple[float, float]`, *optional*): lowest and highest γ with guidance; all by default.
            autoguidance (`torch.nn.Module`, *optional*): a weaker network to guide away from, instead of this one
                without its classes; it also guides models without classes.
            guider (`diffusers.guiders.BaseGuidance`, *optional*): combines the ε̂ instead of the arguments above.
            image (*optional*): PIL images, or arrays or tensors in [0, 1], to start from; one for all or for each. If
                the network is conditioned on images, and without `strength` and `mask_image`: these images, which may
                be smaller than those of the network.
            strength (`float`, *optional*): share of the steps that are done, starting from `image`; defaults to 0.8,
                and to 1 with `mask_image`. The smaller it is, the more of the image stays.
            mask_image (*optional*): what of `image` to repaint: white, or above ½. All other pixels stay the same.
            num_resamples (`int`, defaults to 1): how often each step is done with `mask_image`; more make the new
                pixels fit the known ones better. Needs the ancestral or ddim sampler of this package if above 1.
            cond_vectors (*optional*): a vector of `unet.config.cond_dim` numbers for all images, or one for each.
            cond_images (`torch.Tensor` of shape `(B, cond_channels, h, w)`, *optional*): images that the network is
                conditioned on, in the range in which it was trained, instead of `image`.
            prompt (`str` or `list[str]`, *optional*): a text for all images, or one for each; without one, the empty
                text, for a network that is conditioned on texts.
            negative_prompt (`str` or `list[str]`, *optional*): with guidance, texts to guide away from instead of the
                empty text.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): embedded texts
                instead, with `prompt_attention_mask` and `negative_prompt_attention_mask`, `(B, L)`, if not all of the
                tokens count.

        Returns: `ImagePipelineOutput` with `images`, or a tuple with them.
        Raises: `ValueError` or `TypeError`, before any work is done, for invalid arguments and for arguments that do
            not fit each other, the network or the scheduler. NumPy integers are accepted, booleans are not.
        """
        device = self._execution_device
        takes_image = self.unet.config.get("cond_channels") is not None
        is_condition = takes_image and image is not None and strength is None and mask_image is None
        if is_condition and cond_images is not None:
            raise ValueError("pass either image or cond_images as the condition, not both.")
        takes_text = self.unet.config.get("cross_attention_dim") is not None
        if takes_text and prompt is None and prompt_embeds is None and self.text_encoder is not None:
            prompt = NULL_TEXT
        encode = partial(prompt_conditions, self.text_encoder, self.tokenizer)
        texts = encode("prompt", prompt, prompt_embeds, prompt_attention_mask)
        conditions, single = conditions_of_call(
            self.unet, self.config.num_levels, class_labels, cond_vectors, image if is_condition else None,
            cond_images, texts,
        )  # fmt: skip
        image = None if is_condition else image
        edit = checked_edit(
            image, strength, mask_image, num_resamples, self.scheduler, self.image_shape, self.config.num_levels
        )
        if batch_size is None and edit is not None and single >= conditions.keys() and num_images_per_prompt == 1:
            batch_size = edit.batch_size
        batch_size, conditions = batch_of_conditions(self.unet, batch_size, num_images_per_prompt, conditions, single)
        generator = call_arguments.generators(generator, batch_size, device)
        call_arguments.one_of("decode", decode, ("mode", "sample"))
        call_arguments.one_of("output_type", output_type, ("pil", "np", "pt", "latent"))
        return_dict = call_arguments.boolean("return_dict", return_dict)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got a {type(callback_on_step_end).__name__}.")
        tensor_names = self._callback_tensor_inputs
        if callback_on_step_end_tensor_inputs is not None:
            name = "callback_on_step_end_tensor_inputs"
            tensor_names = call_arguments.names_among(name, callback_on_step_end_tensor_inputs, tensor_names)
        shape = (batch_size, *self.image_shape)
        if latents is not None:
            latents = call_arguments.latents(latents, shape)
        if edit is not None:
            edit.check_batch(batch_size)
        negative = encode("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        may_change = callback_on_step_end is not None
        guides = takes_text and (guidance_scale != 1.0 or guider is not None or may_change)
        if negative and not guides:
            what = "guidance_scale=1" if takes_text else "a network that takes no texts"
            raise ValueError(f"negative_prompt has no effect with {what}; leave it out.")
        if guides and not negative and self.text_encoder is not None and autoguidance is None:
            negative = encode("negative_prompt", NULL_TEXT)
        negative = negative_batch(negative, batch_size, num_images_per_prompt)
        self._set_timesteps(num_inference_steps, timesteps, device)
        guidance = (guidance_scale, guidance_interval, autoguidance, guider, may_change, negative)
        network = guided_network(self.unet, self.scheduler, conditions, *guidance)
        self._guidance_scale = checked_scale(guidance_scale)

        conditions = {name: value.to(device) for name, value in conditions.items()}
        if latents is None:
            # float32 for any network dtype: half-precision latents are too coarse for the last steps
            dtype = denoiser.working_dtype(self.unet)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        steps = self.scheduler.timesteps
        z_t = latents.to(device) * self.scheduler.init_noise_sigma
        if edit is not None:
            first = edit.first_step(self.scheduler)
            steps = steps[first:]
            if first or edit.repainted is None:
                z_t = edit.noisy(self.scheduler, steps[:1], latents.to(device))
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(first)
        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        self._num_timesteps = len(steps)
        bar: Any = self.progress_bar  # whose annotations are those of another method in newer diffusers
        with bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(steps):
                for repeats in reversed(range(1 if edit is None else edit.num_resamples)):
                    model_input = self.scheduler.scale_model_input(z_t, t).to(z_t.dtype)
                    if isinstance(network, GuidedNetwork):
                        network.guidance_scale = checked_scale(self._guidance_scale)  # which a callback may change
                        if guider is not None:
                            guider.set_state(step=i, num_inference_steps=self._num_timesteps, timestep=t)
                    model_output = denoiser.call_network(network, model_input, t, **conditions)
                    model_output = self._channels_for_step(model_output, z_t)
                    z_t = self.scheduler.step(model_output, t, z_t, return_dict=False, **step_kwargs)[0]
                    if edit is not None:
                        z_t = edit.after_step(z_t, self.scheduler, steps[i + 1 : i + 2], generator)
                    if repeats:  # back to the noise level of this step
                        gamma_t, gamma_s = self.scheduler._step_gammas(t)
                        noise = randn_tensor(shape, generator=generator, device=device, dtype=z_t.dtype)
                        z_t = diffusion.forward_step(z_t, noise, gamma_s, gamma_t)
                if callback_on_step_end is not None:
                    available = {"latents": z_t}
                    given = {name: available[name] for name in tensor_names}
                    z_t = self._latents_after_callback(callback_on_step_end(self, i, t, given), z_t)
                progress_bar.update()

        images: Any = z_t if output_type == "latent" else self._images(z_t, decode, output_type, generator, edit)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _channels_for_step(self, model_output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The channels of the network's output for the scheduler's step, see denoiser.py."""
        if isinstance(self.scheduler, GammaScheduler):
            return model_output
        prediction, values = denoiser.split_output(model_output, latents)
        if not isinstance(self.scheduler, DDPMScheduler | DDPMParallelScheduler):
            return prediction  # other schedulers ignore predicted variances, or keep only three channels
        config: Any = self.scheduler.config
        denoiser.check_variance_values(config.variance_type, values)
        return model_output

    def _images(
        self,
        latents: torch.Tensor,
        decode: str,
        output_type: str,
        generator: Generators,
        edit: Edit | None = None,
    ):
        """Decodes z_0 to images through p(x | z_0), at the final noise level of the scheduler.

        What `edit` keeps is as it was.
        """
        gamma = getattr(self.scheduler, "final_gamma", torch.tensor(-math.inf, dtype=torch.float64))
        num_levels = self.config.num_levels
        levels = diffusion.decode(latents, gamma, num_levels, draw=decode == "sample", generator=generator)
        if edit is not None:
            levels = edit.keep(levels)
        return self._of_type(levels, output_type)

    def _latents_after_callback(self, returned: dict[str, Any] | None, latents: torch.Tensor) -> torch.Tensor:
        """The latents that a callback returned, or the current ones."""
        if returned is None:
            return latents
        if not isinstance(returned, dict) or not set(returned) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end must return None or a dict with keys among {self._callback_tensor_inputs}, "
                f"got {sorted(returned) if isinstance(returned, dict) else type(returned).__name__}."
            )
        new = returned.get("latents", latents)
        if not torch.is_tensor(new) or new.shape != latents.shape:
            raise ValueError(f"callback_on_step_end must return latents of shape {tuple(latents.shape)}.")
        return new.to(latents)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the network's images; raises `ValueError` if its config has no `sample_size`."""
        config: Any = self.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size must be set, got None; create the network with its image size.")
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def _set_timesteps(self, num_inference_steps: int | None, timesteps: Any, device: torch.device) -> None:
        if timesteps is None or isinstance(timesteps, str):
            steps = 250 if num_inference_steps is None else num_inference_steps
            steps = call_arguments.positive_integer("num_inference_steps", steps)
            if timesteps is None:
                return self.scheduler.set_timesteps(steps, device=device)
            if timesteps != "best":
                raise ValueError(f"timesteps must be a decreasing list, 'best' or None, got {timesteps!r}.")
            return self.scheduler.set_timesteps(timesteps=best_timesteps_of(self.scheduler, steps), device=device)
        if num_inference_steps is not None:
            raise ValueError("pass either num_inference_steps or timesteps, not both.")
        numbers = call_arguments.decreasing_numbers("timesteps", timesteps)
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"timesteps must be left out, because a {type(self.scheduler).__name__} does not support custom ones; "
                "use num_inference_steps."
            )
        # diffusers' schedulers need integers
        integers = [int(number) if number.is_integer() else number for number in numbers]
        return self.scheduler.set_timesteps(timesteps=integers, device=device)
