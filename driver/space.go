package driver

import (
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
	"scoria/driver/tlog"
)

// The bound of space. The log of a volume, from its oldest SCO to the head, takes no
// more than spaceFactor times what the volume and its snapshots reach plus the size of
// the write buffer. Where that leaves little beside what is reached (a small volume
// and a small buffer), it is minGarbageSCOs more than that: an open SCO takes its whole
// room on the disk, and one that is being emptied takes room twice. Everything is
// counted as it will be on the disk, so it holds there and, since nothing is in the
// store that is not counted, in the store.
//
// It holds because guests get no room in the log beyond it:
//
//	  reached       target      start       slow       hold      allowed
//	─────┼────────────┼───────────┼───────────┼───────────┼──────────┤
//	     │  scrubber  │ it works  │ at once,  │ guests    │ only the │
//	     │  rests     │ by ticks  │ smoothly  │ are slow  │ scrubber │
//
// The scrubber starts in good time before guests would be slow, and goes no faster than
// the disk takes what it moves (tooDirty): a checkpoint then has little to write out, so
// emptied SCOs come back a tenth of a second later and not many at a time. From there on
// the log is written out at normal priority (niceness): on CPU time that is left over the
// scrubber falls behind guests that use most of a CPU, and they wait for it later and longer.
//
// From slow on guests are slowed in proportion, around the rate at which space comes
// back; from hold on they wait. The part behind hold is the scrubber's: what it carries
// to the head takes room before that of where it was comes back. What slows guests does
// not count SCOs that have only to be deleted yet, for which there is room before hold:
// they go several at a time, and guests should not feel that.
//
// Guests can do nothing about what lowers the bound at once: a discard, a deleted
// snapshot; nor about what was there at the opening. Then there is a ceiling that comes
// down with half of what is given back, the other half of which is for guests. And if
// nothing can be given back at all, because the store does not answer, guests go on:
// whether they may is for the disk to say then (P8).
const (
	spaceFactor    = 1.3
	mapFactor      = 0.01 // of what is reached: pages of checkpoints, twice and a half
	minGarbageSCOs = 8
)

// recordBytes is what a cluster's records take in the file of a SCO that is open.
const recordBytes = 2 * tlog.Size

// maxSlow bounds how long a cluster is made to wait before guests are held.
const maxSlow = 250 * time.Microsecond

// houseRest is how long housekeep is left alone after it has ended while guests are not
// slow: it may have found nothing that it could do, and would find that again.
const houseRest = 20 * time.Millisecond

// spaceGate keeps guests within the bound of space. mu is a leaf.
type spaceGate struct {
	sealed   atomic.Int64 // bytes of sealed SCOs, old generations included, that are not deleted
	unsealed atomic.Int64 // bytes of the log behind them, as far as it has chunks
	dead     atomic.Int64 // bytes of sealed SCOs that nothing reaches any more
	moving   atomic.Int64 // the same of the one that is being emptied, as far as it is
	beside   atomic.Int64 // clusters that only snapshots reach, less those in ancestors

	counted atomic.Bool // these are right: the volume has been opened

	near    atomic.Bool // the bound may be reached before the head is full
	giving  atomic.Bool // a checkpoint that gives space back is under way
	cramped atomic.Bool // there is less room than guests may want until it has

	// untaken: nothing is given back because the disk takes no checkpoint, which shows
	// otherwise and passes.
	untaken atomic.Bool

	rested atomic.Int64 // when housekeep ended last, Unix nanoseconds

	due   atomic.Bool  // the scrubber has something to do
	tight atomic.Bool  // guests have a pace to keep, the scrubber does not yield
	hurry atomic.Bool  // they soon have: the log is written out in large pieces
	press atomic.Bool  // they have, and the scrubber does not wait for the write buffer
	held  atomic.Bool  // guests get no room
	slow  atomic.Int64 // nanoseconds that a guest's cluster takes for the pace

	mu      sync.Mutex
	freed   chan struct{} // closed and replaced when guests are not held any more
	stuck   string        // why nothing can be given back
	ceiling int64         // bytes, where it is above the bound; 0: it is not
	gained  int64         // gain when that was set
	steps   uint64        // how often there was progress
	seen    uint64        // steps when watchSpace looked last
	since   time.Time     // since when they are the same
	rate    gainRate
}

// gainRate is how fast space is gained, smoothed.
type gainRate struct {
	perCluster time.Duration
	from       int64 // gain at the moment
	at         time.Time
}

// spaceBudget splits what a volume may take, in bytes.
type spaceBudget struct {
	reached  int64 // of clusters that something refers to
	allowed  int64 // the bound
	reserve  int64 // the scrubber's, and a chunk that guests have begun
	emptying int64 // what a SCO that is emptied takes at most at the head
	pending  int64 // before that, for what has only to be deleted yet
	zone     int64 // before that, where guests are slowed
	target   int64 // the garbage that the scrubber leaves, beside what has only to be deleted
	start    int64 // and from which on it does not wait for the next tick
}

func (v *Volume) spaceBudget() (b spaceBudget) {
	sco := v.cfg.SCOBytes
	b.reached = max(0, int64(v.m.Mapped())+v.space.beside.Load()) * block.ClusterSize
	reached := float64(b.reached)
	buffer := int64(v.eng.pool.n) * chunkBytes
	garbage := max(int64((spaceFactor-1-mapFactor)*reached)+buffer, minGarbageSCOs*sco) - sco
	b.allowed = b.reached + garbage
	b.emptying = sco + sco/32 + 2*chunkBytes*17/16
	b.reserve = b.emptying + 2*chunkBytes*17/16
	b.pending = max(2*sco, int64(0.03*reached))
	b.zone = max(3*sco/2, int64(0.04*reached), buffer/8)
	free := max(sco, garbage-b.reserve-b.pending-b.zone)
	b.target = min(int64(garbageLow*reached)+2*sco, max(free-5*sco/4, free/2))
	b.start = min(free, max(b.target+sco/2, free-max(sco, b.zone/2)))
	return b
}

// spaceUsed is what the log takes, in bytes.
func (v *Volume) spaceUsed() int64 { return v.space.sealed.Load() + v.space.unsealed.Load() }

// spaceGain grows with what is given back, less what that takes elsewhere.
func (v *Volume) spaceGain() int64 {
	return int64(v.stats.reclaimed.Load()) - int64(v.stats.scrubbed.Load()) - int64(v.stats.compacted.Load())
}

// provided is what a SCO's part in unsealed is.
func (l *logSCO) provided() int64 {
	_, clusters := unpack(l.limit.Load())
	return int64(clusters) * (block.ClusterSize + recordBytes)
}

// countSpace makes the account of sealed SCOs right, from what there is; what is not
// sealed is counted once, since the log goes on meanwhile. Caller holds metaMu.
func (v *Volume) countSpace(sealed, dead int64) {
	v.space.sealed.Store(sealed)
	v.space.dead.Store(dead)
	if v.space.counted.Load() {
		return
	}
	var unsealed int64
	for _, l := range v.unsealed {
		unsealed += l.provided()
	}
	v.space.unsealed.Store(unsealed)
	v.space.counted.Store(true)
}

// adjustSpace looks where a volume is within its bound, and lets guests in, slows or
// holds them accordingly. Whoever changes what is used calls it; from any goroutine,
// with any lock but leaves.
func (v *Volume) adjustSpace() {
	s := &v.space
	if !s.counted.Load() || v.eng.still {
		return
	}
	b := v.spaceBudget()
	used, gain := v.spaceUsed(), v.spaceGain()
	s.mu.Lock()
	stuck := s.stuck != ""
	if stuck || used > b.allowed+2*v.cfg.SCOBytes && s.ceiling == 0 {
		s.ceiling, s.gained = used+b.reserve+b.pending+b.zone, gain
	}
	ceiling := b.allowed
	if s.ceiling > 0 {
		if c := s.ceiling - (gain-s.gained)/2; c > ceiling {
			ceiling = c
		} else {
			s.ceiling = 0
		}
	}
	left := ceiling - b.reserve - used // until guests are held
	ahead := left - b.pending + s.dead.Load() + s.moving.Load()
	tight := ahead < b.zone || left < v.cfg.SCOBytes/2
	var slow time.Duration
	var f float64
	if tight && !stuck {
		f = min(4, max(2*(1-float64(ahead)/float64(b.zone)), 2*(1-2*float64(left)/float64(v.cfg.SCOBytes))))
		slow = min(time.Duration(f*float64(s.rate.perCluster)), maxSlow)
	}
	held := left <= 0 && !stuck
	s.near.Store(min(left, ahead) < b.zone+2*v.cfg.SCOBytes)
	due := used-b.reached-s.dead.Load()-s.moving.Load() > b.start
	s.slow.Store(int64(slow))
	s.due.Store(due)
	s.press.Store(f > 0.5)
	s.hurry.Store(ahead < b.zone+v.cfg.SCOBytes/2 || left < v.cfg.SCOBytes)
	s.cramped.Store(left < v.cfg.SCOBytes)
	s.tight.Store(tight)
	if was := s.held.Swap(held); was && !held && s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
	s.mu.Unlock()
	if tight && !stuck {
		v.kickIO()
	}
	if !stuck && (tight || due && time.Now().UnixNano()-s.rested.Load() > int64(houseRest)) {
		v.kickHouse()
	}
}

// spaceWanted reports whether space has to be given back now.
func (v *Volume) spaceWanted() bool { return v.space.tight.Load() || v.space.due.Load() }

// spaceFreed returns a channel that is closed when guests are no longer held; nil if
// they are not.
func (v *Volume) spaceFreed() <-chan struct{} {
	s := &v.space
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.held.Load() {
		return nil
	}
	if s.freed == nil {
		s.freed = make(chan struct{})
	}
	return s.freed
}

// spaceFreedBy says that a SCO of that many bytes has been deleted. Caller holds metaMu.
func (v *Volume) spaceFreedBy(bytes int64) {
	s := &v.space
	s.sealed.Add(-bytes)
	if s.dead.Add(-bytes) < 0 {
		s.dead.Store(0) // it has died since they were counted
	}
}

// spaceCeiling is what is allowed for the time being, where it is more than the bound.
func (v *Volume) spaceCeiling() int64 {
	s := &v.space
	gain := v.spaceGain()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ceiling == 0 {
		return 0
	}
	return s.ceiling - (gain-s.gained)/2
}

// providedMore notes that the head has chunks for so many more clusters.
func (v *Volume) providedMore(clusters uint32) {
	if clusters == 0 {
		return
	}
	v.spaceTaken(0, int64(clusters)*(block.ClusterSize+recordBytes))
	if v.space.near.Load() {
		v.adjustSpace()
	}
}

// spaceTaken adds to what is used: sealed and unsealed bytes. Caller holds metaMu, or
// knows that nobody counts at the same time.
func (v *Volume) spaceTaken(sealed, unsealed int64) {
	v.space.sealed.Add(sealed)
	v.space.unsealed.Add(unsealed)
}

// spaceStep says that something came nearer to being given back.
func (v *Volume) spaceStep() {
	v.space.mu.Lock()
	v.space.steps++
	v.space.mu.Unlock()
	v.adjustSpace()
}

// spaceProgress says that the store has taken or deleted something: guests are held
// again where they must be.
func (v *Volume) spaceProgress() {
	s := &v.space
	s.mu.Lock()
	s.steps++
	was := s.stuck
	s.stuck = ""
	s.mu.Unlock()
	if was != "" {
		v.settle("space-not-reclaimed")
	}
	v.adjustSpace()
}

// spaceSteps is how often there was progress.
func (v *Volume) spaceSteps() uint64 {
	s := &v.space
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.steps
}

// spaceStuck says that nothing can be given back, and why: guests that are slow or wait
// for that need not any more.
func (v *Volume) spaceStuck(why string) {
	s := &v.space
	if !s.tight.Load() {
		return
	}
	s.mu.Lock()
	s.stuck = why
	s.mu.Unlock()
	v.adjustSpace()
	v.raise("space-not-reclaimed", "overwritten space is not given back: %s; the volume takes %d MiB for %d MiB of data and grows beyond its bound until this has ended",
		why, v.spaceUsed()>>20, v.spaceBudget().reached>>20)
}

// raiseSpaceBound explains why guests are slow.
func (v *Volume) raiseSpaceBound() {
	b := v.spaceBudget()
	v.raise("space-bound", "writes are slowed down to the rate at which overwritten space is given back: the volume takes %d MiB for %d MiB of data, it may take %d MiB; a faster disk or store, more CPU or a larger write buffer help",
		v.spaceUsed()>>20, b.reached>>20, b.allowed>>20)
}

// watchSpace shows what slows guests, and lets them go on if a store holds them up that
// neither takes anything nor says why. Called once a second.
func (v *Volume) watchSpace(now time.Time) {
	s := &v.space
	if s.counted.Load() && (s.held.Load() || s.slow.Load() > 0 && v.parked.busy.Load()) {
		v.raiseSpaceBound()
	} else {
		v.settle("space-bound")
	}
	s.mu.Lock()
	if !s.held.Load() || s.steps != s.seen || s.untaken.Load() {
		s.seen, s.since = s.steps, now
	}
	stuck := s.held.Load() && now.Sub(s.since) > slowUpload
	s.mu.Unlock()
	if stuck {
		v.spaceStuck("for a while the store has taken nothing, or what is left of it can't be told from data")
	}
}

// gainPause is after how long without a gain the rate is measured anew.
const gainPause = time.Second

// restart begins to measure when the scrubber begins to work: the time in which it
// rested, because guests left it nothing to do, says nothing about how fast it can be.
// Guests that it could keep up with would be slowed down to what they did before.
func (r *gainRate) restart(now time.Time, gain int64) { r.from, r.at = gain, now }

// measure takes what has been gained by now into account, once that is enough clusters.
func (r *gainRate) measure(now time.Time, gain, enough int64) {
	clusters := (gain - r.from) / block.ClusterSize
	took := now.Sub(r.at)
	switch {
	case clusters >= enough:
		per := took / time.Duration(clusters)
		if r.perCluster > 0 {
			per = (3*r.perCluster + per) / 4
		}
		if took < 10*gainPause || per < r.perCluster {
			r.perCluster = per
		}
	case took < gainPause:
		return
	}
	r.restart(now, gain)
}

// startGain begins to measure the rate at which the scrubber gains space.
func (v *Volume) startGain() {
	gain := v.spaceGain()
	v.space.mu.Lock()
	v.space.rate.restart(time.Now(), gain)
	v.space.mu.Unlock()
}

// measureGain keeps that rate.
func (v *Volume) measureGain() {
	gain := v.spaceGain()
	v.space.mu.Lock()
	v.space.rate.measure(time.Now(), gain, v.cfg.SCOBytes/block.ClusterSize)
	v.space.mu.Unlock()
}
