// Shows texts that stream at one pace: that of the slowest, so that speed does not tell two policies apart.
// What has come is let out smoothly; with reduced motion, in few large steps.

const TICK_MS = 50, STILL_TICK_MS = 600;
const REST = 4;      // after showing, that many times as long is left to all else: an answer of a million characters is slow to lay out
const SHARE = 0.2;   // of what has come and is not shown yet, let out in TICK_MS
const LEAST = 3;     // characters in TICK_MS
const LONGEST_WORD = 40;   // characters; what is longer is no word, or of a script that breaks its lines anywhere

export class Pace {
  // show(texts): called with all that may be seen of each text.
  constructor(count, show) {
    this.texts = Array(count).fill("");
    this.running = Array(count).fill(true);
    this.shown = 0;
    this.show = show;
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.whole = new Promise((resolve) => { this.resolve = resolve; });
    this.wait(0);
  }

  // took: ms that the last showing did.
  wait(took) {
    this.since = performance.now();
    this.timer = setTimeout(() => this.tick(), Math.max(this.still ? STILL_TICK_MS : TICK_MS, REST * took));
  }

  add(index, text) { this.texts[index] += text; }

  end(index) { this.running[index] = false; }

  // Shows all there is, at once: the stream was stopped, or broke off.
  stop() {
    this.running.fill(false);
    this.shown = this.limit();
    clearTimeout(this.timer);
    this.tick();
  }

  // How many characters of each text may be shown: where one has come no further, the other waits.
  limit() {
    const open = this.texts.filter((_, i) => this.running[i]);
    return Math.min(...(open.length ? open : [this.longest()]).map((text) => text.length));
  }

  longest() { return this.texts.reduce((one, other) => (one.length > other.length ? one : other)); }

  tick() {
    const began = performance.now();
    const limit = this.limit();
    const ticks = (began - this.since) / TICK_MS;
    const share = 1 - (1 - SHARE) ** ticks;
    const step = this.still ? Infinity : Math.ceil(Math.max(LEAST * ticks, (limit - this.shown) * share));
    const shown = Math.max(this.shown, Math.min(limit, this.shown + step));
    if (shown > this.shown || !this.running.includes(true)) {
      this.shown = shown;
      this.show(this.texts.map((text, i) => text.slice(0, this.running[i] || shown < text.length ? boundary(text, shown) : shown)));
    }
    if (!this.running.includes(true) && shown >= this.longest().length) this.resolve();
    else this.wait(performance.now() - began);
  }
}

// Whole words only: one that grows at the end of a line would move to the next. Not within a surrogate pair: half an emoji is no character.
function boundary(text, end) {
  if (/\s/.test(text.charAt(end))) return end;
  const begin = Math.max(0, end - LONGEST_WORD);
  const space = text.slice(begin, end).search(/\s\S*$/);
  if (space >= 0) return begin + space + 1;
  const last = text.charCodeAt(end - 1);
  return last >= 0xd800 && last <= 0xdbff ? end + 1 : end;
}
