//! The engine on the GPU driver, over a fake libcuda whose kernels run on the emulator: the same tokens and, where no library
//! multiplies, the same bits as `--device emulated`.

#[path = "../../../tests/fake_cuda/emulator.rs"]
mod emulator;

use emulator::Fake;
use longhaul_engine::{
    Device, DeviceOptions, Engine, EngineError, Generate, Loader, ModelRef, Precision, Request,
};
use longhaul_testkit::{Golden, assert_close, goldens_dir, with_fake_cuda};

const FOLDER: &str = env!("CARGO_TARGET_TMPDIR");

fn load(case: &str, options: DeviceOptions) -> Engine {
    let loader = Loader {
        device: options,
        offline: true,
        ..Loader::new(ModelRef::Directory(goldens_dir().join(case)))
    };
    loader.load(&mut |_, _| {}).unwrap()
}

fn on(device: Device, precision: Precision, enforce_eager: bool) -> DeviceOptions {
    DeviceOptions { device, precision, enforce_eager, ..DeviceOptions::default() }
}

fn logits(engine: &mut Engine, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut all = Vec::new();
    let mut sink = |rows: &[f32]| {
        all.extend_from_slice(rows);
        Ok(())
    };
    engine.logits(ids, Some(chunk), &mut sink).unwrap();
    all
}

/// Few rows: only our kernels run. Many rows: products are the library's.
#[test]
fn logits_are_those_of_the_emulated_device() {
    with_fake_cuda(FOLDER, "logits_are_those_of_the_emulated_device", &[], || {
        let fake = Fake::with_emulator();
        for case in ["dense-dca", "moe-shared"] {
            let golden = Golden::load(&goldens_dir().join(case));
            let mut gpu = load(case, on(Device::Cuda(0), Precision::Auto, false));
            assert!(gpu.device().starts_with("Fake GPU 0, sm_90"), "{}", gpu.device());
            let mut emulated = load(case, on(Device::Emulated, Precision::Auto, false));
            let ours = logits(&mut gpu, &golden.input_ids, 16);
            assert!(!ours.is_empty() && ours == logits(&mut emulated, &golden.input_ids, 16), "{case}");
            drop((gpu, emulated));

            let mut gpu = load(case, on(Device::Cuda(1), Precision::Float32, false));
            let ours = logits(&mut gpu, &golden.input_ids, 512);
            assert_close(&format!("{case} float32"), &ours, &golden.logits, 1e-3);
        }
        assert_eq!(fake.live(), 0, "everything was given back");
    });
}

/// Greedy tokens from recorded steps and op by op.
#[test]
fn tokens_are_those_of_the_emulated_device() {
    with_fake_cuda(FOLDER, "tokens_are_those_of_the_emulated_device", &[], || {
        let fake = Fake::with_emulator();
        let case = "dense-dca";
        let golden = Golden::load(&goldens_dir().join(case));
        let prompt = &golden.input_ids[..40];
        let ids = |device, enforce_eager| {
            let mut engine = load(case, on(device, Precision::Auto, enforce_eager));
            let request = Request { ignore_eos: true, ..Request::greedy(prompt.to_vec(), 6) };
            engine.generate(&request, &mut ()).unwrap().ids
        };
        let expected = ids(Device::Emulated, false);
        assert_eq!(expected.len(), 6);
        assert_eq!(ids(Device::Cuda(0), false), expected);
        assert_eq!(ids(Device::Cuda(0), true), expected);
        assert_eq!(fake.live(), 0, "everything was given back");
    });
}

/// The context that a refusal names does fit: what the budget says is no less than what is taken.
#[test]
fn the_budget_covers_what_is_taken() {
    let memory = (256u64 << 20).to_string();
    let extra = [("FAKE_CUDA_MEMORY", memory.as_str())];
    with_fake_cuda(FOLDER, "the_budget_covers_what_is_taken", &extra, || {
        let fake = Fake::with_emulator();
        for case in ["dense-dca", "moe-64-experts"] {
            let loader = Loader {
                // All of the device: nothing is left for a mistake.
                device: DeviceOptions {
                    gpu_memory_utilization: 1.0,
                    enforce_eager: true,
                    ..on(Device::Cuda(0), Precision::Auto, true)
                },
                max_model_len: Some(1 << 24),
                offline: true,
                ..Loader::new(ModelRef::Directory(goldens_dir().join(case)))
            };
            let Err(error) = loader.load(&mut |_, _| {}) else { panic!("{case}: 16 million tokens fit") };
            assert!(matches!(error, EngineError::Memory { .. }), "{error}");
            let message = error.to_string();
            let most = message.split("--max-model-len ").nth(1).and_then(|rest| rest.split(' ').next());
            let most: usize = most.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{message}"));
            let fitting = Loader { max_model_len: Some(most), ..loader };
            let engine =
                fitting.load(&mut |_, _| {}).unwrap_or_else(|e| panic!("{case}, {most} tokens: {e}"));
            assert_eq!((engine.max_model_len(), engine.notes()), (most, &[][..]));
            drop(engine);
            assert_eq!(fake.live(), 0, "everything was given back");
        }
    });
}
