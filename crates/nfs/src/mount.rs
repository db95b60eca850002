//! The MOUNT protocol, version 3 (RFC 1813, 5): the root's handle for a name.

use crate::call::{AUTH_SYS, Refusal};
use crate::export::Export;
use crate::xdr::{Reader, Writer};

pub(crate) const PROGRAM: u32 = 100_005;
const MAX_PATH: usize = 1024;
const NO_ENTRY: u32 = 2;

/// The results of a procedure.
pub(crate) fn answer(exports: &[Export], procedure: u32, r: &mut Reader<'_>) -> Result<Writer, Refusal> {
    let mut w = Writer::default();
    match procedure {
        // Nothing; who has left.
        0 | 3 | 4 => {}
        1 => {
            let path = r.opaque(MAX_PATH).map_err(|_| Refusal::Garbage)?;
            match exports.iter().find(|e| e.name().as_bytes() == path) {
                Some(export) => w.u32(0).opaque(export.root_handle()).u32(1).u32(AUTH_SYS),
                None => w.u32(NO_ENTRY),
            };
        }
        // Who has mounted what is not kept.
        2 => {
            w.bool(false);
        }
        5 => {
            for export in exports {
                w.bool(true).opaque(export.name().as_bytes()).bool(false);
            }
            w.bool(false);
        }
        _ => return Err(Refusal::NoProcedure),
    }
    Ok(w)
}
