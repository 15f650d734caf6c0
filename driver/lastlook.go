package driver

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"scoria/driver/lba"
)

// The last look at a SCO before its space is given back asks where the clusters that its
// records name are now. When the store has lost the records, it walks the maps instead:
// the volume's, and that of the first snapshot which is not older than the SCO, of
// which later ones and clones reach a part only (snapshot.go). One walk of a map
// serves all SCOs that are to go at that time. What part of a map can't be read says
// about a SCO is not known: then it stays.

// lastLooks is what maps say of SCOs that only have to be deleted yet. It belongs to one
// publish.
type lastLooks struct {
	doomed map[uint64]bool
	// found is, by snapshot, or uuid.Nil for the volume, which of the doomed SCOs the
	// map refers to, with one of the clusters.
	found map[uuid.UUID]map[uint64]uint64
}

func newLastLooks(doomed []uint64) *lastLooks {
	l := &lastLooks{doomed: map[uint64]bool{}, found: map[uuid.UUID]map[uint64]uint64{}}
	for _, n := range doomed {
		l.doomed[n] = true
	}
	return l
}

// walkPause is after how many clusters a walk lets guests go first.
const walkPause = 64 * lba.LeafClusters

// clusterIn is a cluster that a map has in a doomed SCO. No later write makes a map refer
// to a SCO that is sealed, so that each leaf may be of another moment, and what a walk
// did not find in one SCO it has not missed in another.
func (v *Volume) clusterIn(ctx context.Context, looks *lastLooks, n uint64, of uuid.UUID, m *lba.Map) (cluster uint64, found bool, err error) {
	if looks.found[of] == nil {
		in := map[uint64]uint64{}
		seen := 0
		var yerr error
		err := m.Walk(ctx, v.ckpt, 0, m.Clusters(), func(at uint64, loc lba.Location) bool {
			if looks.doomed[loc.SCO()] {
				in[loc.SCO()] = at
			}
			if seen++; seen%walkPause == 0 {
				yerr = v.yield(ctx)
			}
			return yerr == nil
		})
		if err = errors.Join(err, yerr); err != nil {
			return 0, false, err
		}
		looks.found[of] = in
	}
	cluster, found = looks.found[of][n]
	return cluster, found, nil
}

// lookAgain is when it is tried again to read what of a map was lost.
const lookAgain = scrubRetryData

// takeDoomed returns the SCOs that are to be deleted now. Those of which nothing was
// known are among them at times, as a map's page may be brought back. Caller holds mu.
func (c *checkpoints) takeDoomed() []uint64 {
	doomed := c.doomed
	c.doomed = nil
	if len(c.unsure) > 0 && time.Now().After(c.unsureUntil) {
		doomed = append(doomed, c.unsure...)
		c.unsure = nil
	}
	return doomed
}

// keepUnsure puts SCOs off of which nothing is known. Caller holds mu.
func (c *checkpoints) keepUnsure(scos []uint64) {
	if len(scos) > 0 {
		c.unsure = append(c.unsure, scos...)
		c.unsureUntil = time.Now().Add(lookAgain)
	}
}

// keepCurrent keeps a SCO that counts as empty although a cluster is current in it.
func (v *Volume) keepCurrent(m *scoMeta, cluster uint64) {
	v.live.at(m.number).Add(1)
	v.metaMu.Lock()
	m.doomed, m.unwanted = false, false
	v.metaMu.Unlock()
	v.kickUpload()
	v.raise("accounting", "SCO %d counted as empty but cluster %d is current in it; it is kept", m.number, cluster)
}

// keepPinned keeps a SCO that counts as empty although a snapshot has a cluster in it,
// unless that was deleted meanwhile.
func (v *Volume) keepPinned(m *scoMeta, s *snapshotState, cluster uint64) (still bool) {
	v.metaMu.Lock()
	if still = v.findSnapshot(s.ID) >= 0; still {
		v.pins[m.number]++
		m.doomed, m.unwanted = false, false
	}
	v.metaMu.Unlock()
	if still {
		v.kickUpload()
		v.raise("accounting", "SCO %d counted as empty but snapshot %s has cluster %d in it; it is kept", m.number, s.Name, cluster)
	}
	return still
}
