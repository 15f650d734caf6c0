package client

import (
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// logPage is the unit of the dirty log (VHOST_LOG_PAGE).
const logPage = 4096

// DirtyLog is the bitmap in which the server marks the guest pages it wrote,
// one bit each from guest address 0.
type DirtyLog struct {
	fd, event int
	mapping   *mem.Mapping
}

// StartLog makes the server log what it writes, as a front end does when a live
// migration begins: SET_LOG_BASE, SET_LOG_FD, then the feature LOG_ALL and the
// rings' log flag.
func (c *Client) StartLog() (*DirtyLog, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.protocol&wire.ProtocolLogShmFD == 0 || c.offered&FeatureLogAll == 0 {
		return nil, fmt.Errorf("start log: %w: LOG_SHMFD and LOG_ALL", ErrNotNegotiated)
	}
	l, err := newDirtyLog(c.nextGuest)
	if err != nil {
		return nil, err
	}
	c.log = l
	if err := c.sendLog(); err != nil {
		c.log = nil
		l.close()
		return nil, err
	}
	return l, c.setLogging(true)
}

// sendLog hands the log to the server. It needs c.mu.
func (c *Client) sendLog() error {
	size := wire.Log{Size: uint64(len(c.log.mapping.Bytes()))}
	_, fds, err := c.conn.Call(wire.SetLogBase, size.Append(nil), c.log.fd)
	mem.CloseAll(fds)
	if err != nil {
		return err
	}
	return c.conn.Do(wire.SetLogFD, nil, c.log.event)
}

// StopLog ends what StartLog began. The log is gone afterwards.
func (c *Client) StopLog() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.log == nil {
		return nil
	}
	l := c.log
	c.log = nil
	defer l.close()
	return c.setLogging(false)
}

func (c *Client) setLogging(on bool) error {
	c.features &^= FeatureLogAll
	if on {
		c.features |= FeatureLogAll
	}
	if err := c.conn.Do(wire.SetFeatures, wire.AppendU64(nil, c.features)); err != nil {
		return err
	}
	for _, q := range c.queues {
		if err := c.conn.Do(wire.SetVringAddr, c.vringAddr(q).Append(nil)); err != nil {
			return err
		}
	}
	return nil
}

func newDirtyLog(guestEnd uint64) (*DirtyLog, error) {
	size := pageAlign(guestEnd / logPage / 8)
	fd, err := mem.CreateMemfd("vhost-client-log", int64(size))
	if err != nil {
		return nil, err
	}
	l := &DirtyLog{fd: fd, event: -1}
	if err = mem.SealSize(fd); err == nil {
		l.mapping, err = mem.Map(fd, 0, size)
	}
	if err == nil {
		l.event, err = mem.NewEventFD()
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *DirtyLog) close() {
	unix.Close(l.fd)
	if l.event >= 0 {
		unix.Close(l.event)
	}
	if l.mapping != nil {
		l.mapping.Release()
	}
}

// Dirty says whether the page of guest address addr is marked.
func (l *DirtyLog) Dirty(addr uint64) bool {
	page := addr / logPage
	return loadByte(l.mapping.Bytes(), page/8)&(1<<(page%8)) != 0
}

// Take calls fn with the guest address of every marked page and clears the
// marks, as a migration does in each of its rounds.
func (l *DirtyLog) Take(fn func(guestAddr uint64)) {
	for i, word := range swapWords(l.mapping.Bytes()) {
		for ; word != 0; word &= word - 1 {
			fn((uint64(i)*64 + uint64(bits.TrailingZeros64(word))) * logPage)
		}
	}
}
