package lba

import "fmt"

// Sizes of the table. A leaf maps the clusters of one aligned stretch of the
// volume and is one page in memory and in a checkpoint.
const (
	PageBytes    = 4096          // bytes of a leaf page
	LeafClusters = PageBytes / 8 // clusters that a leaf maps: 2 MiB of volume
	MaxClusters  = 1 << 34       // clusters of the largest volume: 64 TiB
	MaxLeaves    = MaxClusters / LeafClusters
)

// Location says where a cluster lies: SCO number (34 bits), cluster index
// within the SCO (18 bits), clone level (12 bits), from the most significant
// bit on. Within one volume locations only grow, so that the larger of two
// locations of a cluster is the newer one. Zero means unmapped; SCO numbers
// start at 1.
type Location uint64

// Limits of a location's parts, all inclusive.
const (
	MaxSCO     = 1<<34 - 1
	MaxCluster = 1<<18 - 1
	MaxLevel   = 1<<12 - 1
)

const (
	locSCOShift     = 30
	locClusterShift = 12
)

// MakeLocation returns the location of a cluster of the volume itself (clone
// level 0). sco and cluster must be within MaxSCO and MaxCluster.
func MakeLocation(sco uint64, cluster uint32) Location {
	if sco > MaxSCO || cluster > MaxCluster {
		panic(fmt.Sprintf("lba: location of SCO %d cluster %d does not fit", sco, cluster))
	}
	return Location(sco<<locSCOShift | uint64(cluster)<<locClusterShift)
}

// SCO returns the SCO number.
func (l Location) SCO() uint64 { return uint64(l >> locSCOShift) }

// Cluster returns the index of the cluster within its SCO.
func (l Location) Cluster() uint32 { return uint32(l>>locClusterShift) & MaxCluster }

// Level returns the clone level: 0 is the volume itself, 1 its parent, …
func (l Location) Level() uint16 { return uint16(l & MaxLevel) }

// WithLevel returns the same place seen from another clone level.
func (l Location) WithLevel(level uint16) Location {
	if level > MaxLevel {
		panic(fmt.Sprintf("lba: clone level %d does not fit", level))
	}
	return l&^MaxLevel | Location(level)
}

// String returns the parts as "sco:cluster", with "@level" when that is not 0.
func (l Location) String() string {
	switch {
	case l == 0:
		return "unmapped"
	case l.Level() == 0:
		return fmt.Sprintf("%d:%d", l.SCO(), l.Cluster())
	}
	return fmt.Sprintf("%d:%d@%d", l.SCO(), l.Cluster(), l.Level())
}

// SlotOf returns slot i of a stored leaf's page, which is PageBytes long.
func SlotOf(page []byte, i uint64) Location { return Location(le.Uint64(page[8*i:])) }

// PageAddr says where a leaf's page is stored: checkpoint object number (high
// 32 bits, from 1 on) and index of the page within the object. Zero is none.
type PageAddr uint64

// MakePageAddr joins object number and page index.
func MakePageAddr(object, page uint32) PageAddr {
	return PageAddr(uint64(object)<<32 | uint64(page))
}

// Object returns the number of the checkpoint object.
func (a PageAddr) Object() uint32 { return uint32(a >> 32) }

// Page returns the index of the page within its object.
func (a PageAddr) Page() uint32 { return uint32(a) }

// String returns "object/page".
func (a PageAddr) String() string { return fmt.Sprintf("%d/%d", a.Object(), a.Page()) }
