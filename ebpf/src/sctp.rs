//! SCTP's ways: a checksum over the packet alone, by CRC-32C, and chunks where TCP has flags.

use aya_ebpf::programs::TcContext;

use crate::packet::{ACK, FIN, RST, SYN};

/// The polynomial of CRC-32C (RFC 9260, appendix A), lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// 1 in the same order.
const ONE: u32 = 1 << 31;
/// x⁸, what one more byte multiplies by.
const BYTE: u32 = 1 << 23;
/// Digits of a packet's length in base 16.
const DIGITS: usize = 4;

/// What so many bytes multiply by, modulo the polynomial: by the place of a digit in the length, and the digit.
static POWERS: [u32; DIGITS * 16] = {
    let mut powers = [ONE; DIGITS * 16];
    let (mut digit, mut unit) = (0, BYTE);
    while digit < DIGITS {
        let mut value = 1;
        while value < 16 {
            powers[digit * 16 + value] = multiply(powers[digit * 16 + value - 1], unit);
            value += 1;
        }
        unit = multiply(powers[digit * 16 + 15], unit);
        digit += 1;
    }
    powers
};

/// struct sctphdr (include/linux/sctp.h) and the first chunk's type; ports in network order.
#[repr(C)]
pub struct Header {
    pub source: u16,
    pub destination: u16,
    _tag: u32,
    _checksum: u32,
    pub chunk: u8,
    _chunk: [u8; 3],
}

/// The TCP flags that say the same as a packet's first chunk: types of RFC 9260, section 3.2.
#[inline(always)]
pub fn flags(chunk: u8) -> u8 {
    match chunk {
        // INIT, INIT ACK, ABORT.
        1 => SYN,
        2 => SYN | ACK,
        6 => RST,
        // SHUTDOWN, SHUTDOWN ACK, SHUTDOWN COMPLETE: each side sends one of them.
        7 | 8 | 14 => FIN,
        _ => ACK,
    }
}

/// Puts right the checksum at `at` bytes for ports that change: `changed` is the old ones xor the new ones, as they stand
/// in the packet's first four bytes. `length` is the packet's, from its ports to its end.
///
/// CRCs are linear: what the packet's differs by is the CRC of the difference, which is `changed` and zeroes behind it.
/// A checksum of 0 is one that the device is yet to compute (`CHECKSUM_PARTIAL`).
#[inline(always)]
pub fn replace_checksum(ctx: &TcContext, at: usize, changed: u32, length: u32) -> Result<(), i64> {
    let old: u32 = ctx.load(at)?;
    if old == 0 {
        return Ok(());
    }
    let new = old ^ sctp_behind(changed, length);
    ctx.store(at, &new, 0)
}

/// `value` times x to the power of eight times `length`, modulo the polynomial.
///
/// Under a name of its own it is a global function to the verifier, which looks at it once, whatever the numbers, and not
/// again on each way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_behind(value: u32, length: u32) -> u32 {
    let mut value = value;
    for digit in 0..DIGITS as u32 {
        value = multiply(value, power(digit, length >> (4 * digit) & 15));
    }
    value
}

#[inline(always)]
fn power(digit: u32, value: u32) -> u32 {
    let place = (digit * 16 + value) as usize & (DIGITS * 16 - 1);
    // SAFETY: the mask keeps the place within the table, whose length is a power of two. Volatile, or the compiler would
    // compute what it knows of the table where it is used.
    unsafe { POWERS.as_ptr().add(place).read_volatile() }
}

/// The product of two polynomials modulo the polynomial. Without branches, each of which the verifier would follow; in 64
/// bits, which take fewer instructions than 32.
#[inline(always)]
const fn multiply(a: u32, b: u32) -> u32 {
    let (a, mut b, mut product) = (a as u64, b as u64, 0_u64);
    let mut bit = 0;
    while bit < 32 {
        product ^= b & all_or_none(a >> (31 - bit));
        b = b >> 1 ^ POLYNOMIAL as u64 & all_or_none(b);
        bit += 1;
    }
    product as u32
}

/// All bits as the lowest one is.
#[inline(always)]
const fn all_or_none(bits: u64) -> u64 {
    0_u64.wrapping_sub(bits & 1)
}
