//! What a build begins with.

use nidus_sandbox::MachineSize;
use nidus_storage::{Artifact, BuildId};
use nidus_template::{BuildRequest, Context, Source, Start, TemplateMetadata};

use crate::PipelineError;
use crate::key::LayerKey;
use crate::layers::Layer;
use crate::machine::Work;
use crate::pipeline::{Base, Based, Found, Pipeline, Run};

impl Pipeline {
    /// A root file system that is booted once. With `plain` it is all that the template is, and then it is made under the
    /// template's own build id.
    pub(crate) async fn base_of_source(
        &self,
        run: &mut Run<'_>,
        base: &Base,
        plain: bool,
    ) -> Result<Based, PipelineError> {
        let spec = run.spec;
        let (source, name, identity, context) = self.source(base).await?;
        let (sizes, kernel) = ((spec.vcpu, spec.memory_mb, spec.disk_mb, spec.huge_pages), &spec.kernel);
        let key = LayerKey::of("base", &(&identity, sizes, kernel, &self.vmm, &self.config.programs));
        let title = format!("[base] FROM {name}");
        let turn = match self.find(run, key, &title).await? {
            Found::Cached(layer) => return Ok(Based::Layer(key, Box::new(layer))),
            Found::Make(turn) => turn,
        };
        let request = BuildRequest {
            template_id: spec.template_id.clone(),
            build_id: if plain { spec.build_id } else { BuildId::random() },
            vcpu: spec.vcpu,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            source,
            huge_pages: spec.huge_pages,
            kernel: spec.kernel.clone(),
            context: context.clone(),
        };
        let metadata = self.builder.build(request, &run.log, run.cancel).await.map_err(|e| match e {
            nidus_template::BuildError::Cancelled => PipelineError::Cancelled,
            e => e.into(),
        })?;
        let layer = Layer {
            build_id: metadata.build_id,
            owned: !plain,
            context,
            args: Default::default(),
            start: Start::default(),
            what: title,
            bytes: self.stored_bytes(metadata.build_id).await,
        };
        let layer = self.keep(run, key, layer, turn).await?;
        Ok(if plain { Based::Published(Box::new(metadata)) } else { Based::Layer(key, Box::new(layer)) })
    }

    /// Another template as it is, or its disk booted in another size or by another VMM.
    pub(crate) async fn base_of_template(
        &self,
        run: &mut Run<'_>,
        build: BuildId,
        name: &str,
    ) -> Result<(LayerKey, Layer), PipelineError> {
        let spec = run.spec;
        if !self.cache.hold(build, &mut run.held).await? {
            return Err(PipelineError::NoTemplate(build));
        }
        let text = self.factory.store().read(build, Artifact::Metadata).await?;
        let m = TemplateMetadata::parse(build, &text).map_err(nidus_sandbox::RepublishError::from)?;
        let key = LayerKey::of("template", &build.to_string());
        let title = format!("[base] FROM TEMPLATE {name}");
        let layer = Layer {
            build_id: build,
            owned: false,
            context: m.context.clone(),
            args: Default::default(),
            start: m.start.clone(),
            what: title.clone(),
            bytes: 0,
        };
        let or = |wanted: u32, own: u32| if wanted == 0 { own } else { wanted };
        let size = MachineSize {
            vcpu: or(spec.vcpu, m.vcpu),
            memory_mb: or(spec.memory_mb, m.memory_mb),
            disk_mb: or(spec.disk_mb, m.disk_mb).max(m.disk_mb),
        };
        let own = MachineSize { vcpu: m.vcpu, memory_mb: m.memory_mb, disk_mb: m.disk_mb };
        if size == own && m.vmm.to_string() == self.vmm && !m.filesystem_only {
            run.log.info(title);
            return Ok((key, layer));
        }
        let sizes = (size.vcpu, size.memory_mb, size.disk_mb);
        let key = LayerKey::of("size", &(key, sizes, &self.vmm));
        let (vcpu, memory, disk) = sizes;
        let title =
            format!("{title}, booted with {vcpu} vCPUs, {memory} MiB of memory and {disk} MiB of disk");
        match self.find(run, key, &title).await? {
            Found::Cached(layer) => Ok((key, layer)),
            Found::Make(turn) => {
                let mut next = Layer { what: title, ..layer.clone() };
                self.in_machine(run, &layer, Some(size), Work::Grow, &mut next).await?;
                Ok((key, self.keep(run, key, next, turn).await?))
            }
        }
    }

    /// Where the files come from, its name, what tells it from others, and what it says of programs.
    async fn source(&self, base: &Base) -> Result<(Source, String, Vec<String>, Context), PipelineError> {
        Ok(match base {
            Base::Debian { suite, packages } => {
                let more = match packages.len() {
                    0 => String::new(),
                    n => format!(", {n} more than every base has"),
                };
                let identity =
                    ["debian", suite].into_iter().map(str::to_owned).chain(packages.iter().cloned());
                (
                    Source::Debian { suite: suite.clone(), packages: packages.clone() },
                    format!("debian:{suite} (from packages{more})"),
                    identity.collect(),
                    Context::default(),
                )
            }
            Base::Image { path } => {
                let shown = path.display().to_string();
                let (size, changed) = nidus_template::image_identity(path)?;
                let identity = vec!["file".into(), shown.clone(), size.to_string(), changed.to_string()];
                (Source::Image { path: path.clone() }, shown, identity, Context::default())
            }
            Base::Registry { reference, credentials } => {
                let image = self.registry.find(reference, credentials).await;
                let image = image.map_err(nidus_template::BuildError::from)?;
                let identity = vec!["image".into(), image.digest.to_string()];
                let context = Context { env_vars: image.config.environment(), ..Context::default() };
                let name = format!("{reference} ({})", image.digest);
                (Source::Registry(Box::new(image)), name, identity, context)
            }
            Base::Template { name, .. } => {
                return Err(PipelineError::BadRequest(format!("'{name}' is a template, not an image")));
            }
        })
    }

    /// What a build takes on the disk, for the account of the cache.
    async fn stored_bytes(&self, build: BuildId) -> u64 {
        let store = self.factory.store().local().clone();
        let used = tokio::task::spawn_blocking(move || store.usage(build)).await;
        used.ok().and_then(Result::ok).flatten().map_or(0, |(bytes, _)| bytes)
    }
}
