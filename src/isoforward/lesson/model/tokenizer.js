"use strict";
// Text <-> ids, for the two kinds of tokenizer.json that training writes: byte-level BPE and single characters.

class Tokenizer {
  constructor({ tokens, merges, byte_level, special, start, ends }) {
    Object.assign(this, { tokens, start, ends, byteLevel: byte_level, special: new Set(special) });
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.known = new Map(); // of words met already
  }

  // Text that spells a special token is text. Throws where a character tokenizer has no such character.
  encode(text) {
    const ids = [];
    for (const word of this.byteLevel ? (text.match(WORDS) ?? []) : [text]) {
      if (!this.known.has(word)) this.known.set(word, this.merged(word));
      ids.push(...this.known.get(word));
    }
    return ids;
  }

  merged(word) {
    let parts = this.byteLevel ? Array.from(new TextEncoder().encode(word), (byte) => SPELT[byte]) : Array.from(word);
    for (;;) {
      // the pair that was learnt first is joined first
      let best = Infinity,
        at = -1;
      for (let i = 0; i + 1 < parts.length && this.ranks.size; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.map((part) => {
      const id = this.ids.get(part);
      if (id === undefined) throw new UnknownCharacter(part);
      return id;
    });
  }

  decode(ids) {
    const text = ids
      .map((id) => this.tokens[id])
      .filter((token) => !this.special.has(token))
      .join("");
    if (!this.byteLevel) return text;
    const bytes = Array.from(text).flatMap((c) => (BYTES.has(c) ? [BYTES.get(c)] : [...new TextEncoder().encode(c)]));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }
}

class UnknownCharacter extends Error {
  constructor(character) {
    super(`the tokenizer knows no ${JSON.stringify(character)}`);
    this.character = character;
  }
}

// GPT-2's words (Radford 2019, encoder.py), and its letters for bytes: printable ones are themselves, the rest follow 255.
const WORDS =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const SPELT = (() => {
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : 256 + others++));
})();
const BYTES = new Map(SPELT.map((letter, byte) => [letter, byte]));
