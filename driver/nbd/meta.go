package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"scoria/driver/block"
)

// metaContext is one that a client has selected: base:allocation, or a snapshot
// since which changes are asked for.
type metaContext struct {
	id    uint32 // what it is called in replies
	since string // snapshot; empty: base:allocation
}

// optMeta answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (c *conn) optMeta(ctx context.Context, option uint32, data []byte) error {
	if option == optSetMeta {
		c.metaFor, c.metas = "", nil
	}
	if !c.structured {
		return c.refuse(option, repErrInvalid, "metadata contexts need structured replies, negotiate those first")
	}
	name, queries, err := parseMetaRequest(data, maxQueries)
	if err != nil {
		return c.refuseFor(option, err)
	}
	n, err := parseExportName(name)
	if err != nil {
		return c.refuseFor(option, err)
	}
	if option == optListMeta {
		return c.listMeta(ctx, n.volume, queries)
	}
	snapshots, err := c.snapshotsFor(ctx, n.volume, queries)
	if err != nil {
		return c.refuseFor(option, err)
	}
	var b []byte
	for _, q := range queries {
		since := sinceOf(q)
		if q != contextAllocation && (since == "" || !slices.Contains(snapshots, since)) {
			continue // unknown ones are ignored, says the protocol
		}
		m := metaContext{id: uint32(len(c.metas) + 1), since: since}
		c.metas = append(c.metas, m)
		b = appendOptReply(b, option, repMeta, appendMeta(nil, m.id, q))
	}
	if len(c.metas) > 0 {
		c.metaFor = n.volume
	}
	return c.send(appendOptReply(b, option, repAck, nil))
}

// sinceOf returns the snapshot that a context is about, empty if it is not about
// one.
func sinceOf(query string) string {
	if s, ok := strings.CutPrefix(query, contextSince); ok {
		return s
	}
	s, _ := strings.CutPrefix(query, contextBitmap)
	if s == query {
		return ""
	}
	return s
}

// snapshotsFor lists the snapshots of an export if a query is about one. An
// export that does not exist has none: clients select contexts before NBD_OPT_GO,
// which may create the volume and has the better error.
func (c *conn) snapshotsFor(ctx context.Context, volume string, queries []string) ([]string, error) {
	if !slices.ContainsFunc(queries, func(q string) bool { return sinceOf(q) != "" }) {
		return nil, nil
	}
	dev, err := c.s.Opener.Open(ctx, volume)
	if errors.Is(err, block.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer block.Release(dev)
	if d, ok := dev.(block.Differ); ok {
		return d.Since(ctx)
	}
	return nil, nil
}

// listMeta answers NBD_OPT_LIST_META_CONTEXT: exact names, whole namespaces, and
// all if nothing is asked for.
func (c *conn) listMeta(ctx context.Context, volume string, queries []string) error {
	dev, err := c.s.Opener.Open(ctx, volume)
	if err != nil {
		return c.refuseFor(optListMeta, err)
	}
	defer block.Release(dev)
	names := []string{contextAllocation}
	if d, ok := dev.(block.Differ); ok {
		snapshots, err := d.Since(ctx)
		if err != nil {
			return c.refuseFor(optListMeta, err)
		}
		for _, prefix := range []string{contextSince, contextBitmap} {
			for _, s := range snapshots {
				names = append(names, prefix+s)
			}
		}
	}
	var b []byte
	for _, name := range names {
		if len(queries) > 0 && !slices.ContainsFunc(queries, func(q string) bool { return listed(name, q) }) {
			continue
		}
		b = appendOptReply(b, optListMeta, repMeta, appendMeta(nil, 0, name))
		if len(b) > maxOption {
			if err := c.send(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	return c.send(appendOptReply(b, optListMeta, repAck, nil))
}

// listed says whether a query of a list means a context.
func listed(name, query string) bool {
	switch query {
	case "base:", "scoria:", contextSince, "qemu:", contextBitmap:
		return strings.HasPrefix(name, query)
	}
	return name == query
}

// blockStatus answers NBD_CMD_BLOCK_STATUS with a chunk for each context.
func (c *conn) blockStatus(o *op) {
	defer c.finish(o)
	if len(c.metas) == 0 {
		o.err = errNoMeta
		return
	}
	if o.err = c.inside(&o.cmd); o.err != nil {
		return
	}
	if o.cmd.length == 0 {
		o.err = fmt.Errorf("block status of no bytes: %w", block.ErrAlignment)
		return
	}
	limit := maxExtents
	if o.cmd.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	var parts [][]byte
	for i, m := range c.metas {
		list, err := c.statusOf(m, o.cmd.offset, uint64(o.cmd.length), limit)
		if err == nil && len(list) == 0 {
			err = fmt.Errorf("block status of %d bytes at %d: %w", o.cmd.length, o.cmd.offset, block.ErrRange)
		}
		if o.err = err; err != nil {
			return
		}
		var flags uint16
		if i == len(c.metas)-1 {
			flags = chunkDone
		}
		parts = append(parts, appendStatus(flags, o.cmd.cookie, m, list))
	}
	o.parts = parts
}

func (c *conn) statusOf(m metaContext, off, length uint64, limit int) ([]block.Extent, error) {
	if m.since == "" {
		return c.extents(off, length, limit, false)
	}
	d, ok := c.dev.(block.Differ)
	if !ok {
		return nil, errNoMeta
	}
	return gatherExtents(limit, func(fn func(block.Extent) bool) error {
		if err := d.Changes(c.ctx, m.since, off, length, fn); err != nil {
			return fmt.Errorf("changes of %d bytes at %d since %s: %w", length, off, m.since, err)
		}
		return nil
	})
}

// gatherExtents collects at most limit extents, neighbours of one kind joined.
func gatherExtents(limit int, each func(fn func(block.Extent) bool) error) (list []block.Extent, err error) {
	err = each(func(e block.Extent) bool {
		n := len(list)
		switch {
		case n > 0 && list[n-1].Mapped == e.Mapped:
			list[n-1].Length += e.Length
		case n == limit:
			return false
		default:
			list = append(list, e)
		}
		return true
	})
	return list, err
}

// appendStatus makes the chunk of one context.
func appendStatus(flags uint16, cookie uint64, m metaContext, list []block.Extent) []byte {
	b := make([]byte, 0, chunkBytes+4+8*len(list))
	b = appendChunk(b, flags, chunkBlockStatus, cookie, uint32(4+8*len(list)))
	b = binary.BigEndian.AppendUint32(b, m.id)
	for _, e := range list {
		var state uint32
		switch {
		case m.since == "" && !e.Mapped:
			state = stateHole | stateZero
		case m.since != "" && e.Mapped:
			state = stateChanged
		}
		b = binary.BigEndian.AppendUint32(b, uint32(e.Length))
		b = binary.BigEndian.AppendUint32(b, state)
	}
	return b
}
