// SPDX-License-Identifier: Apache-2.0

/// Points in time as text.
package enum Timestamp {
  package static var now: String { text(Clock.realtime) }
  package static func text(_ nanoseconds: Int64) -> String { String(decoding: bytes(nanoseconds), as: UTF8.self) }

  /// Formats nanoseconds since 1970 as RFC 3339 in UTC. It calls no C library function, since those read locale and zone files.
  package static func bytes(_ now: Int64) -> [UInt8] {
    let (days, second) = (now / 86_400_000_000_000, now / 1_000_000_000 % 86_400)
    let date = civil(days)
    var text: [UInt8] = []
    func digits(_ value: Int64, _ width: Int, _ suffix: UInt8) {
      var place: Int64 = 1
      for _ in 1..<width { place *= 10 }
      while place > 0 {
        text.append(UInt8(ascii: "0") + UInt8(value / place % 10))
        place /= 10
      }
      text.append(suffix)
    }
    digits(date.year, 4, UInt8(ascii: "-"))
    digits(date.month, 2, UInt8(ascii: "-"))
    digits(date.day, 2, UInt8(ascii: "T"))
    digits(second / 3600, 2, UInt8(ascii: ":"))
    digits(second / 60 % 60, 2, UInt8(ascii: ":"))
    digits(second % 60, 2, UInt8(ascii: "."))
    digits(now % 1_000_000_000, 9, UInt8(ascii: "Z"))
    return text
  }

  /// Returns the proleptic Gregorian date of a day number since 1970-01-01; it counts in years that begin in March.
  private static func civil(_ days: Int64) -> (year: Int64, month: Int64, day: Int64) {
    let shifted = days + 719_468
    let era = shifted / 146_097
    let dayOfEra = shifted % 146_097
    let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
    let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
    let shiftedMonth = (5 * dayOfYear + 2) / 153
    let month = shiftedMonth < 10 ? shiftedMonth + 3 : shiftedMonth - 9
    return (yearOfEra + era * 400 + (month <= 2 ? 1 : 0), month, dayOfYear - (153 * shiftedMonth + 2) / 5 + 1)
  }
}
