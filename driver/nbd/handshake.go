package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"scoria/driver/block"
)

// handshake carries out the fixed newstyle negotiation. It returns whether the
// transmission phase follows; not if the client aborted. The whole of it is
// bounded by Server.HandshakeTime.
func (c *conn) handshake() (transmit bool, err error) {
	if err := c.nc.SetDeadline(time.Now().Add(c.s.HandshakeTime)); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.s.HandshakeTime)
	defer cancel()
	hello := binary.BigEndian.AppendUint64(nil, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if err := c.send(hello); err != nil {
		return false, err
	}
	var b [optHeaderBytes]byte
	if _, err := io.ReadFull(c.r, b[:4]); err != nil {
		return false, fmt.Errorf("client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return false, fmt.Errorf("client flags %#x: only %#x are known: %w", flags, flagFixedNewstyle|flagNoZeroes, errProtocol)
	}
	for range maxOptions {
		if _, err := io.ReadFull(c.r, b[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return false, nil // hung up between options
			}
			return false, fmt.Errorf("option: %w", err)
		}
		option, length, err := decodeOptHeader(b[:])
		if err != nil {
			return false, fmt.Errorf("%w: %w", err, errProtocol)
		}
		if length > maxOption {
			return false, fmt.Errorf("option %d has %d bytes of data, at most %d are allowed: %w", option, length, maxOption, errProtocol)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return false, fmt.Errorf("option %d: %w", option, err)
		}
		if option != optExportName && flags&flagFixedNewstyle == 0 {
			return false, fmt.Errorf("option %d without fixed newstyle: %w", option, errProtocol)
		}
		end, err := c.option(ctx, option, data, flags&flagNoZeroes != 0)
		if err != nil {
			return false, err
		}
		if end {
			if c.dev == nil {
				return false, nil
			}
			if err := c.nc.SetDeadline(time.Time{}); err != nil {
				return false, err
			}
			// A stop that fell before the line above left its mark there.
			return true, c.ctx.Err()
		}
	}
	return false, fmt.Errorf("%d options in one handshake: %w", maxOptions, errProtocol)
}

// option answers one option; end says that the handshake is over.
func (c *conn) option(ctx context.Context, option uint32, data []byte, noZeroes bool) (end bool, err error) {
	if c.ctx.Err() != nil && option != optAbort {
		return false, c.refuse(option, repErrStop, "the server is shutting down")
	}
	switch option {
	case optExportName:
		return true, c.optExportName(ctx, string(data), noZeroes)
	case optAbort:
		// The client may be gone already.
		_ = c.send(appendOptReply(nil, option, repAck, nil))
		return true, nil
	case optList:
		return false, c.optList(ctx, data)
	case optInfo, optGo:
		return c.optInfo(ctx, option, data)
	case optStructuredReply:
		if len(data) != 0 {
			return false, c.refuse(option, repErrInvalid, "NBD_OPT_STRUCTURED_REPLY has no data")
		}
		c.structured = true
		return false, c.send(appendOptReply(nil, option, repAck, nil))
	case optListMeta, optSetMeta:
		return false, c.optMeta(ctx, option, data)
	case optStartTLS:
		return false, c.refuse(option, repErrPolicy, "the helper socket is local and has no TLS")
	}
	return false, c.refuse(option, repErrUnsup, fmt.Sprintf("option %d is unknown", option))
}

// send writes in the handshake; the transmission phase has its own writer.
func (c *conn) send(b []byte) error {
	_, err := c.nc.Write(b)
	return err
}

// refuse answers an option with an error and its text.
func (c *conn) refuse(option, code uint32, message string) error {
	return c.send(appendOptReply(nil, option, code, []byte(message[:min(len(message), maxString)])))
}

// refuseFor chooses the error reply for a failed look-up of an export.
func (c *conn) refuseFor(option uint32, err error) error {
	code := uint32(repErrPolicy)
	switch {
	case errors.Is(err, block.ErrNotFound):
		code = repErrUnknown
	case errors.Is(err, errBadName), errors.Is(err, errMalformed):
		code = repErrInvalid
	case errors.Is(err, errTooLong), errors.Is(err, errTooMany):
		code = repErrTooBig
	}
	return c.refuse(option, code, err.Error())
}

// optExportName ends the handshake the old way, which has no error replies: an
// export that can't be had ends the connection.
func (c *conn) optExportName(ctx context.Context, name string, noZeroes bool) error {
	if len(name) > maxString {
		return fmt.Errorf("export name of %d bytes, at most %d are allowed: %w", len(name), maxString, errProtocol)
	}
	dev, volume, err := c.s.open(ctx, c.peer, name, true)
	if err != nil {
		return fmt.Errorf("NBD_OPT_EXPORT_NAME: %w", err)
	}
	info := dev.Info()
	c.enter(dev, volume, &info)
	reply := appendInfoExport(nil, info.Size, c.transmissionFlags(&info))
	if !noZeroes {
		reply = append(reply, make([]byte, 124)...)
	}
	return c.send(reply)
}

func (c *conn) optList(ctx context.Context, data []byte) error {
	if len(data) != 0 {
		return c.refuse(optList, repErrInvalid, "NBD_OPT_LIST has no data")
	}
	names, err := c.s.Opener.Names(ctx)
	if err != nil {
		return c.refuseFor(optList, err)
	}
	var b []byte
	for _, name := range names {
		b = appendOptReply(b, optList, repServer, appendServer(nil, name))
		if len(b) > maxOption {
			if err := c.send(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	return c.send(appendOptReply(b, optList, repAck, nil))
}

// optInfo answers NBD_OPT_INFO and NBD_OPT_GO. Only the latter may create.
func (c *conn) optInfo(ctx context.Context, option uint32, data []byte) (end bool, err error) {
	name, wanted, err := parseInfoRequest(data)
	if err != nil {
		return false, c.refuseFor(option, err)
	}
	dev, volume, err := c.s.open(ctx, c.peer, name, option == optGo)
	if err != nil {
		c.log.Debug().Err(err).Str("export", name).Msg("nbd export refused")
		return false, c.refuseFor(option, err)
	}
	info := dev.Info()
	b := appendOptReply(nil, option, repInfo,
		appendInfoExport(binary.BigEndian.AppendUint16(nil, infoExport), info.Size, c.transmissionFlags(&info)))
	b = appendOptReply(b, option, repInfo,
		appendInfoBlockSize(nil, 1, max(info.PhysicalBlock, info.LogicalBlock), maxPayload))
	if slices.Contains(wanted, infoName) {
		b = appendOptReply(b, option, repInfo, appendInfoString(nil, infoName, volume))
	}
	if slices.Contains(wanted, infoDescription) {
		b = appendOptReply(b, option, repInfo, appendInfoString(nil, infoDescription, "Scoria volume "+info.Serial))
	}
	b = appendOptReply(b, option, repAck, nil)
	if option == optGo {
		c.enter(dev, volume, &info)
	} else {
		block.Release(dev)
	}
	return option == optGo, c.send(b)
}

func (c *conn) transmissionFlags(info *block.Info) uint16 {
	flags := uint16(txHasFlags | txFlush | txFUA | txTrim | txWriteZeroes | txFastZero)
	if info.ReadOnly {
		flags |= txReadOnly
	}
	if c.structured {
		flags |= txDF
	}
	// Two connections of one claimant see one cache, and any reader does.
	if c.peer.pid > 0 || info.ReadOnly {
		flags |= txMultiConn
	}
	return flags
}

// enter makes dev the connection's export.
func (c *conn) enter(dev block.Device, volume string, info *block.Info) {
	c.dev = dev
	c.lb = uint64(info.LogicalBlock)
	c.readOnly = info.ReadOnly
	c.maxZero = math.MaxUint32 &^ (c.lb - 1)
	if limit := info.MaxDiscard &^ (c.lb - 1); limit != 0 && limit < c.maxZero {
		c.maxZero = limit
	}
	if c.metaFor != volume {
		c.metas = nil
	}
	c.name.Store(&volume)
}
