//! SANITIZE (SBC-4, section 5.30): what is asked, and what a unit that is being sanitized answers to everything else.

use cairn_block::sanitize::{Method, Pattern, Sanitize};

use super::sense::{Sense, Status};
use super::unit::Unit;
use crate::wire::u16_at;

const OVERWRITE: u8 = 0x01;
const BLOCK_ERASE: u8 = 0x02;
/// Bytes of OVERWRITE's parameter list before the pattern.
const HEADER_LEN: usize = 4;

/// What a SANITIZE asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SanitizeCommand {
    /// That every block is done: complete it once a majority of the volume's voters has stored that, and where it is not
    /// `immediate` once all is done. Until then, and whoever has aborted it, nothing but it uses the volume.
    Begin {
        /// What is done.
        sanitize: Sanitize,
        /// IMMED.
        immediate: bool,
    },
    /// EXIT FAILURE MODE: a sanitize that failed is over.
    Exit,
}

/// What logical units are told of a sanitize of what backs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanitizeState {
    /// It is under way.
    Running {
        /// How much is done, in 65536ths.
        progress: u16,
    },
    /// It failed.
    Failed {
        /// AUSE was set: EXIT FAILURE MODE ends it.
        unrestricted: bool,
    },
}

impl SanitizeState {
    /// What is told to whoever asks how the unit is, and to commands that are not carried out.
    pub(crate) fn sense(self) -> Sense {
        match self {
            Self::Running { progress } => Sense::sanitizing(progress),
            Self::Failed { .. } => Sense::SANITIZE_FAILED,
        }
    }
}

/// How a SANITIZE ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanitizeEnd {
    /// All is done, or begun.
    Good,
    /// A replica could not do it: [`SanitizeState::Failed`].
    Failed,
    /// The volume has snapshots, or is a clone: nothing was begun.
    Shares,
    /// That it begins could not be stored now: nothing was begun.
    NotStored(cairn_block::IoStatus),
}

impl From<SanitizeEnd> for Status {
    fn from(end: SanitizeEnd) -> Self {
        match end {
            SanitizeEnd::Good => Self::Good,
            SanitizeEnd::Failed => Sense::SANITIZE_FAILED.into(),
            SanitizeEnd::Shares => Sense::COMMAND_SEQUENCE.into(),
            SanitizeEnd::NotStored(status) => Self::of(status),
        }
    }
}

/// What a SANITIZE comes to; nothing where there is nothing to do. `list` is its parameter list.
///
/// # Errors
/// What makes no sense, and what may not be done to the unit.
pub(crate) fn command(
    unit: &Unit,
    state: Option<SanitizeState>,
    cdb: &[u8; 16],
    list: &[u8],
) -> Result<Option<SanitizeCommand>, Status> {
    let (immediate, unrestricted) = (cdb[1] & 0x80 != 0, cdb[1] & 0x20 != 0);
    let restricted = state == Some(SanitizeState::Failed { unrestricted: false });
    let action = cdb[1] & 0x1f;
    let len = usize::from(u16_at(cdb, 7));
    let block_len = unit.config.block_size.bytes() as usize;
    let fits = match action {
        OVERWRITE => (HEADER_LEN + 1..=HEADER_LEN + block_len).contains(&len),
        _ => len == 0,
    };
    if !fits {
        return Err(Sense::invalid_cdb(7, 7).into());
    }
    if unit.is_write_protected() {
        return Err(Sense::WRITE_PROTECTED.into());
    }
    let method = match action {
        OVERWRITE => overwrite(list, block_len)?,
        BLOCK_ERASE => Method::Erase,
        // One that failed in the restricted mode is ended by another that does not.
        _ if restricted => return Err(Sense::invalid_cdb(1, 4).into()),
        _ => return Ok(state.map(|_| SanitizeCommand::Exit)),
    };
    if restricted && unrestricted {
        return Err(Sense::invalid_cdb(1, 5).into());
    }
    let sanitize = Sanitize::new(method, unrestricted);
    Ok(Some(SanitizeCommand::Begin { sanitize, immediate }))
}

fn overwrite(list: &[u8], block_len: usize) -> Result<Method, Sense> {
    let (Some(&flags), Some(bytes)) = (list.first(), list.get(HEADER_LEN..)) else {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    };
    let (invert, test, passes) = (flags & 0x80 != 0, flags & 0x60, flags & 0x1f);
    if test != 0 || passes == 0 {
        return Err(Sense::invalid_parameter(0));
    }
    if list[1] != 0 {
        return Err(Sense::invalid_parameter(1));
    }
    let len = usize::from(u16_at(list, 2));
    let pattern = bytes.get(..len).filter(|_| (1..=block_len).contains(&len));
    let pattern = pattern.and_then(|bytes| Pattern::of(bytes, block_len));
    let pattern = pattern.ok_or(Sense::invalid_parameter(2))?;
    Ok(Method::Overwrite { pattern, passes, invert })
}
